//! The XMP packet (ISO 16684-1): that a trained model made the picture, in IPTC's words, and all of it as JSON.

/// The keyword by which a PNG carries the packet.
pub(super) const PNG_KEYWORD: &str = "XML:com.adobe.xmp";

/// IPTC's word for a picture that a trained model made.
const SOURCE_TYPE: &str = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";

/// A read-only packet; the JSON is `hypnos:drawn`.
pub(super) fn packet(json: Option<&str>) -> String {
    let drawn = json.map_or(String::new(), |json| format!("<hypnos:drawn>{}</hypnos:drawn>", escaped(json)));
    format!(
        "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\
         <x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\
         <rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">\
         <rdf:Description rdf:about=\"\" \
         xmlns:Iptc4xmpExt=\"http://iptc.org/std/Iptc4xmpExt/2008-02-29/\" xmlns:hypnos=\"urn:hypnos:xmp/\">\
         <Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>{drawn}\
         </rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end=\"r\"?>"
    )
}

/// JSON as the text of an element. JSON has escaped the control characters that XML cannot have; two others are left.
fn escaped(json: &str) -> String {
    let xml = json.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    xml.replace('\u{fffe}', "\\ufffe").replace('\u{ffff}', "\\uffff")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_prompt_breaks_the_packet() {
        let prompt = "a <mug> & ]]> \u{1}\r\n\u{fffe}\u{ffff} \u{feff}";
        let packet = packet(Some(&serde_json::json!({ "prompt": prompt }).to_string()));
        let inside =
            packet.split_once("<hypnos:drawn>").and_then(|(_, rest)| rest.split_once('<')).unwrap().0;
        assert!(inside.chars().all(|c| !c.is_control() && !matches!(c, '>' | '\u{fffe}' | '\u{ffff}')));
        let json = inside.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read["prompt"], prompt);
    }
}
