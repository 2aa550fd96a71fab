//! Reads a JPEG's markers without decoding it. Needed because the decoder silently fills missing data with grey, and
//! decodes any number of scans.

/// What the markers up to the end of the first picture contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct JpegInfo {
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) n_components: u8,
    pub(super) progressive: bool,
    pub(super) n_scans: usize,
}

/// Reads the markers. `None` unless there is one whole picture: exactly one frame, a scan, and the end.
pub(super) fn read_info(bytes: &[u8]) -> Option<JpegInfo> {
    let mut info: Option<JpegInfo> = None;
    let mut rest = bytes.strip_prefix(&[0xFF, 0xD8])?;
    loop {
        // Entropy-coded bytes are skipped like any garbage between markers: in them FF is followed by 0.
        let at = rest.iter().position(|&byte| byte == 0xFF)?;
        rest = &rest[at..];
        let fill = rest.iter().position(|&byte| byte != 0xFF)?;
        let marker = rest[fill];
        rest = &rest[fill + 1..];
        match marker {
            0x00 | 0x01 | 0xD0..=0xD8 => continue,
            0xD9 => return info.filter(|info| info.n_scans > 0),
            _ => {}
        }
        let n_bytes = usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        let segment = rest.get(2..n_bytes)?;
        rest = &rest[n_bytes..];
        match marker {
            0xC0..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => {
                let &[_precision, h1, h0, w1, w0, n_components, ..] = segment else { return None };
                let frame = JpegInfo {
                    width: u16::from_be_bytes([w1, w0]),
                    height: u16::from_be_bytes([h1, h0]),
                    n_components,
                    progressive: matches!(marker, 0xC2 | 0xC6 | 0xCA | 0xCE),
                    n_scans: 0,
                };
                if info.replace(frame).is_some() {
                    return None;
                }
            }
            0xDA => info.as_mut()?.n_scans += 1,
            _ => {}
        }
    }
}
