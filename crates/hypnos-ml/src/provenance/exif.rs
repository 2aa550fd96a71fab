//! EXIF (CIPA DC-008) with one field: a comment, as AUTOMATIC1111's web UI writes it.

/// Entry of the first directory that says where the EXIF directory is.
const EXIF_DIRECTORY: u16 = 0x8769;
const USER_COMMENT: u16 = 0x9286;

const LONG: u16 = 4;
const UNDEFINED: u16 = 7;

/// The header before the first directory: big-endian.
const HEADER: &[u8; 8] = b"MM\0\x2a\0\0\0\x08";
/// Bytes of a directory of one entry.
const DIRECTORY: usize = 2 + 12 + 4;

/// The block, without a container's own prefix: TIFF's header, a directory that names the EXIF directory, that
/// directory with `UserComment` in UTF-16.
pub(super) fn user_comment(text: &str) -> Vec<u8> {
    let mut comment = b"UNICODE\0".to_vec();
    comment.extend(text.encode_utf16().flat_map(u16::to_be_bytes));
    let second = HEADER.len() + DIRECTORY;
    let directories = [
        directory(EXIF_DIRECTORY, LONG, 1, second),
        directory(USER_COMMENT, UNDEFINED, comment.len(), second + DIRECTORY),
    ];
    [HEADER, directories.as_flattened(), &comment].concat()
}

/// A directory of one entry, the last one.
fn directory(tag: u16, kind: u16, count: usize, value: usize) -> [u8; DIRECTORY] {
    let mut bytes = [0; DIRECTORY];
    bytes[..2].copy_from_slice(&1_u16.to_be_bytes());
    bytes[2..4].copy_from_slice(&tag.to_be_bytes());
    bytes[4..6].copy_from_slice(&kind.to_be_bytes());
    bytes[6..10].copy_from_slice(&(count as u32).to_be_bytes());
    bytes[10..14].copy_from_slice(&(value as u32).to_be_bytes());
    bytes
}
