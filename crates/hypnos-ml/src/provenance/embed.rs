//! Puts EXIF and XMP into files of our own encoders, whose pixels stay as they are.
//!
//! JPEG: EXIF and XMP each in an APP1 segment after JFIF's APP0 (ISO 16684-3, 1.1.3). WebP: chunks in the extended form
//! of its container (RFC 9649, 2.7).

/// Most bytes of a JPEG segment, without its marker and its length.
const SEGMENT_MAX: usize = 0xffff - 2;

const SOI: usize = 2;
const APP0: [u8; 2] = [0xff, 0xe0];
const APP1: [u8; 2] = [0xff, 0xe1];

/// Flags of WebP's extended header.
const HAS_EXIF: u8 = 0x08;
const HAS_XMP: u8 = 0x04;

/// The content of the APP1 segment of an EXIF block.
pub(super) fn exif_segment(exif: &[u8]) -> Vec<u8> {
    [b"Exif\0\0", exif].concat()
}

/// The content of the APP1 segment of an XMP packet.
pub(super) fn xmp_segment(packet: &str) -> Vec<u8> {
    [b"http://ns.adobe.com/xap/1.0/\0", packet.as_bytes()].concat()
}

/// Whether a segment can hold this.
pub(super) fn fits(segment: &[u8]) -> bool {
    segment.len() <= SEGMENT_MAX
}

/// A JPEG with further APP1 segments, each of which [`fits`].
pub(super) fn jpeg_with(file: &[u8], segments: &[Vec<u8>]) -> Vec<u8> {
    let jfif = match file.get(SOI..) {
        Some([a, b, high, low, ..]) if [*a, *b] == APP0 => 2 + usize::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    };
    let (head, rest) = file.split_at((SOI + jfif).min(file.len()));
    let mut out = head.to_vec();
    for segment in segments {
        out.extend_from_slice(&APP1);
        out.extend_from_slice(&(segment.len() as u16 + 2).to_be_bytes());
        out.extend_from_slice(segment);
    }
    out.extend_from_slice(rest);
    out
}

/// A WebP of one lossy frame in the extended form, with EXIF, if there is any, and XMP.
pub(super) fn webp_with(
    file: &[u8],
    (width, height): (usize, usize),
    exif: Option<&[u8]>,
    xmp: &str,
) -> Vec<u8> {
    let flags = HAS_XMP | if exif.is_some() { HAS_EXIF } else { 0 };
    let mut header = vec![flags, 0, 0, 0];
    for side in [width, height] {
        header.extend_from_slice(&(side.saturating_sub(1) as u32).to_le_bytes()[..3]);
    }
    let mut content = b"WEBP".to_vec();
    chunk(&mut content, *b"VP8X", &header);
    content.extend_from_slice(file.get(12..).unwrap_or_default()); // the frame, without RIFF's header
    if let Some(exif) = exif {
        chunk(&mut content, *b"EXIF", exif);
    }
    chunk(&mut content, *b"XMP ", xmp.as_bytes());
    let mut out = Vec::with_capacity(8 + content.len());
    chunk(&mut out, *b"RIFF", &content);
    out
}

/// A chunk of RIFF, of even length.
fn chunk(out: &mut Vec<u8>, name: [u8; 4], content: &[u8]) {
    out.extend_from_slice(&name);
    out.extend_from_slice(&(content.len() as u32).to_le_bytes());
    out.extend_from_slice(content);
    if content.len() % 2 == 1 {
        out.push(0);
    }
}
