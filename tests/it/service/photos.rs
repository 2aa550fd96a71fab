//! Invalid and hostile uploads. Every picture is made here; the numbers are those of tests/CASES.md.

use std::io::Cursor;
use std::time::{Duration, Instant};

use hypnos::ml::random;
use hypnos::photo::{Decoder, Limits, Photo, Refusal, Warning, decode, duplicates};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::metadata::Orientation;
use image::{
    DynamicImage, ExtendedColorType, GrayImage, ImageBuffer, ImageEncoder, Luma, LumaA, Rgb, RgbImage, Rgba,
    RgbaImage,
};
use moxcms::ColorProfile;

/// A picture that looks different from every side.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let light = (x * 255 / width) as u8;
        match (x / 16 + y / 16) % 2 {
            0 => Rgb([light, (y * 255 / height) as u8, 40]),
            _ => Rgb([200, light, 255 - light]),
        }
    })
}

/// Metadata for a file.
#[derive(Clone, Default)]
struct Extra {
    exif: Option<Vec<u8>>,
    icc: Option<Vec<u8>>,
}

fn encode(mut encoder: impl ImageEncoder, image: &DynamicImage, extra: &Extra) {
    if let Some(exif) = &extra.exif {
        encoder.set_exif_metadata(exif.clone()).unwrap();
    }
    if let Some(icc) = &extra.icc {
        encoder.set_icc_profile(icc.clone()).unwrap();
    }
    let color = ExtendedColorType::from(image.color());
    encoder.write_image(image.as_bytes(), image.width(), image.height(), color).unwrap();
}

fn png_with(image: &DynamicImage, extra: &Extra) -> Vec<u8> {
    let mut file = Vec::new();
    encode(PngEncoder::new(&mut file), image, extra);
    file
}

fn jpeg_with(image: &DynamicImage, extra: &Extra) -> Vec<u8> {
    let mut file = Vec::new();
    encode(JpegEncoder::new_with_quality(&mut file, 95), image, extra);
    file
}

fn webp_with(image: &DynamicImage, extra: &Extra) -> Vec<u8> {
    let mut file = Vec::new();
    encode(WebPEncoder::new_lossless(&mut file), image, extra);
    file
}

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    png_with(&image.into(), &Extra::default())
}

fn jpeg(image: impl Into<DynamicImage>) -> Vec<u8> {
    jpeg_with(&image.into(), &Extra::default())
}

fn webp(image: impl Into<DynamicImage>) -> Vec<u8> {
    webp_with(&image.into(), &Extra::default())
}

fn lossy_webp(image: &RgbImage) -> Vec<u8> {
    webp::Encoder::from_rgb(image, image.width(), image.height()).encode(90.0).to_vec()
}

fn taken(bytes: &[u8]) -> Photo {
    decode(bytes, &Limits::default()).unwrap_or_else(|refusal| panic!("{refusal}"))
}

fn refused(bytes: &[u8]) -> Refusal {
    decode(bytes, &Limits::default()).expect_err("a refusal")
}

fn pixels(photo: &Photo) -> RgbImage {
    image::load_from_memory(&photo.png).unwrap().into_rgb8()
}

/// The largest difference of any channel of any pixel.
fn distance(a: &RgbImage, b: &RgbImage) -> u8 {
    assert_eq!(a.dimensions(), b.dimensions());
    a.iter().zip(b.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// The mean difference of a channel.
fn mean_distance(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    a.iter().zip(b.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64
}

/// The names of a PNG's chunks.
fn chunks(png: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = &png[8..];
    while !rest.is_empty() {
        let size = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
        names.push(String::from_utf8(rest[4..8].to_vec()).unwrap());
        rest = &rest[size + 12..];
    }
    names.dedup();
    names
}

fn chunk(name: &str, data: &[u8]) -> Vec<u8> {
    let mut chunk = (data.len() as u32).to_be_bytes().to_vec();
    chunk.extend_from_slice(name.as_bytes());
    chunk.extend_from_slice(data);
    let sum = crc32fast::hash(&chunk[4..]);
    chunk.extend_from_slice(&sum.to_be_bytes());
    chunk
}

/// A PNG with `extra` chunks behind its header.
fn png_of(width: u32, height: u32, depth: u8, color: u8, extra: &[Vec<u8>], data: &[u8]) -> Vec<u8> {
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend_from_slice(&[depth, color, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    file.extend(chunk("IHDR", &header));
    file.extend(extra.concat());
    file.extend(chunk("IDAT", data));
    file.extend(chunk("IEND", b""));
    file
}

/// A PNG file with a chunk put in behind its header.
fn with_chunk(png: &[u8], name: &str, data: &[u8]) -> Vec<u8> {
    [&png[..33], &chunk(name, data), &png[33..]].concat()
}

/// `n_bytes` zeros as a zlib stream of a two-hundredth of that: one literal, then matches of 258.
fn zeros(n_bytes: u64) -> Vec<u8> {
    let (mut stream, mut held, mut n_held) = (vec![0x78, 0x01], 0_u64, 0);
    // Huffman codes go high bit first, everything else low bit first.
    let mut push = |bits: u64, n: u32| {
        held |= bits << n_held;
        n_held += n;
        while n_held >= 8 {
            stream.push(held as u8);
            held >>= 8;
            n_held -= 8;
        }
    };
    push(0b011, 3); // the last block, fixed codes
    push(0b0000_1100, 8); // the literal 0, code 00110000
    let mut left = n_bytes - 1;
    while left >= 258 {
        push(0b1010_0011, 8); // 285, code 11000101
        push(0, 5); // distance 1
        left -= 258;
    }
    for _ in 0..left {
        push(0b0000_1100, 8);
    }
    push(0, 7); // the end
    push(0, 7); // up to a whole byte
    let sum = (n_bytes % 65_521) << 16 | 1;
    stream.extend_from_slice(&(sum as u32).to_be_bytes());
    stream
}

/// A segment of a JPEG.
fn segment(marker: u8, data: &[u8]) -> Vec<u8> {
    let size = (data.len() + 2) as u16;
    [&[0xFF, marker], &size.to_be_bytes()[..], data].concat()
}

/// A flat JPEG with `n_components`, its frame of kind `frame`, with so many scans of all-zero differences.
fn flat_jpeg(width: u16, height: u16, frame: u8, n_components: u8, n_scans: usize) -> Vec<u8> {
    let mut file = vec![0xFF, 0xD8];
    file.extend(segment(0xDB, &[&[0][..], &[1; 64]].concat()));
    let mut head = vec![8];
    head.extend_from_slice(&height.to_be_bytes());
    head.extend_from_slice(&width.to_be_bytes());
    head.push(n_components);
    (1..=n_components).for_each(|id| head.extend_from_slice(&[id, 0x11, 0]));
    file.extend(segment(frame, &head));
    // One code of one bit, 0, that means category 0; as DC and as AC, where it ends the block.
    for table in [0x00, 0x10] {
        let mut lengths = [0; 17];
        lengths[0] = table;
        lengths[1] = 1;
        file.extend(segment(0xC4, &[&lengths[..], &[0]].concat()));
    }
    let blocks = usize::from(width.div_ceil(8)) * usize::from(height.div_ceil(8)) * usize::from(n_components);
    for _ in 0..n_scans {
        let mut scan = vec![n_components];
        (1..=n_components).for_each(|id| scan.extend_from_slice(&[id, 0]));
        scan.extend_from_slice(if frame == 0xC2 { &[0, 0, 0] } else { &[0, 63, 0] });
        file.extend(segment(0xDA, &scan));
        let bits = if frame == 0xC2 { blocks } else { blocks * 2 };
        file.extend(std::iter::repeat_n(0, if n_scans > 1 { 4 } else { bits.div_ceil(8) }));
    }
    file.extend([0xFF, 0xD9]);
    file
}

/// TIFF metadata in little or big endian: entries of (tag, type, count, value).
fn tiff(big: bool, entries: &[(u16, u16, u32, u32)]) -> Vec<u8> {
    let short = |value: u16| if big { value.to_be_bytes() } else { value.to_le_bytes() };
    let long = |value: u32| if big { value.to_be_bytes() } else { value.to_le_bytes() };
    let mut data = if big { b"MM".to_vec() } else { b"II".to_vec() };
    data.extend(short(42));
    data.extend(long(8));
    data.extend(short(entries.len() as u16));
    for &(tag, kind, count, value) in entries {
        data.extend([short(tag), short(kind)].concat());
        data.extend(long(count));
        // A short stands in the first two bytes of its field.
        data.extend(if kind == 3 { [short(value as u16), short(0)].concat() } else { long(value).to_vec() });
    }
    data.extend(long(0));
    data
}

fn oriented(orientation: u16) -> Extra {
    let exif = tiff(orientation.is_multiple_of(2), &[(0x112, 3, 1, orientation.into())]);
    Extra { exif: Some(exif), icc: None }
}

/// Memory of this process at its highest so far, in MiB. Each test has a process of its own.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

// case 1
#[test]
fn an_empty_file_is_refused() {
    assert_eq!((refused(b"").code, refused(b"").status), ("image-empty", 422));
}

// case 2
#[test]
fn a_small_jpeg_that_claims_to_be_huge_is_refused_before_anything_is_allocated_for_it() {
    let mut bomb = flat_jpeg(65_500, 65_500, 0xC0, 3, 2);
    bomb.extend([0; 400]);
    assert!(bomb.len() < 700, "{}", bomb.len());
    let before = peak_mib();
    let refusal = refused(&bomb);
    assert_eq!(refusal.code, "image-too-large");
    assert!(refusal.message.contains("65500 x 65500"), "{refusal}");
    assert!(peak_mib() - before < 5);
}

// case 3
#[test]
fn a_png_of_144_million_black_pixels_is_refused_before_anything_is_allocated_for_it() {
    let bomb = png_of(12_000, 12_000, 8, 2, &[], &zeros(12_000 * (12_000 * 3 + 1)));
    let before = peak_mib();
    assert_eq!(refused(&bomb).code, "image-too-large");
    assert!(peak_mib() - before < 5);
}

// case 4
#[test]
fn a_png_within_the_pixels_but_not_within_the_memory_is_refused() {
    assert_eq!(refused(&png_of(8_192, 8_192, 16, 6, &[], &zeros(1000))).code, "image-too-large");
    let bomb = png_of(6_000, 6_000, 16, 6, &[], &zeros(6_000 * (6_000 * 8 + 1)));
    let before = peak_mib();
    let refusal = refused(&bomb);
    assert_eq!(refusal.code, "image-too-large");
    assert!(refusal.message.contains("274 MiB"), "{refusal}");
    assert!(peak_mib() - before < 5);
    // A progressive JPEG keeps its coefficients too.
    let refusal = refused(&flat_jpeg(6_000, 6_000, 0xC2, 3, 1));
    assert!(refusal.message.contains("308 MiB"), "{refusal}");
}

// case 5
#[test]
fn chunks_that_inflate_to_300_mb_are_not_inflated() {
    let good = png(picture(300, 300));
    let bomb = zeros(300_000_000);
    let bombs = [
        ("iCCP", [b"x\0\0", &bomb[..]].concat()),
        ("zTXt", [b"x\0\0", &bomb[..]].concat()),
        ("iTXt", [b"x\0\x01\0\0\0", &bomb[..]].concat()),
        ("eXIf", vec![0; 40_000_000]),
    ];
    for (name, data) in bombs {
        let file = with_chunk(&good, name, &data);
        let before = peak_mib();
        match decode(&file, &Limits::default()) {
            Ok(photo) => assert_eq!(chunks(&photo.png), ["IHDR", "IDAT", "IEND"], "{name}"),
            Err(refusal) => assert_eq!(refusal.status, 422, "{name}"),
        }
        let grown = peak_mib() - before;
        assert!(grown < 100, "{name}: {grown} MiB");
    }
}

// case 6
#[test]
fn a_truncated_file_is_refused_or_whole_and_never_half_an_image() {
    let picture = picture(300, 280);
    let files = [
        jpeg(picture.clone()),
        png(picture.clone()),
        webp(picture.clone()),
        lossy_webp(&picture),
        flat_jpeg(300, 280, 0xC2, 1, 1),
    ];
    for (kind, file) in files.iter().enumerate() {
        let whole = pixels(&taken(file));
        let mut n_refused = 0;
        for n in 0..100 {
            match decode(&file[..file.len() * n / 100], &Limits::default()) {
                Ok(photo) => assert_eq!(distance(&pixels(&photo), &whole), 0, "file {kind} at {n} %"),
                Err(refusal) => n_refused += usize::from(matches!(refusal.status, 415 | 422)),
            }
        }
        assert!(n_refused >= 95, "file {kind}: {n_refused} of 100 refused");
    }
}

// case 7
#[test]
fn the_content_decides_what_a_file_is() {
    let picture = picture(320, 260);
    for file in [png(picture.clone()), jpeg(picture.clone()), webp(picture.clone()), lossy_webp(&picture)] {
        let photo = taken(&file);
        assert_eq!((photo.width, photo.height), (320, 260));
        assert!(mean_distance(&pixels(&photo), &picture) < 8.0);
        assert_eq!(chunks(&photo.png), ["IHDR", "IDAT", "IEND"]);
    }
    assert_eq!(distance(&pixels(&taken(&png(picture.clone()))), &picture), 0);
}

// case 8
#[test]
fn other_kinds_of_files_are_named_and_refused_with_what_is_accepted() {
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    let files: [(&str, Vec<u8>); 12] = [
        ("image/gif", b"GIF89a\x01\0\x01\0\x80\0\0".to_vec()),
        ("image/bmp", b"BM\x3a\0\0\0\0\0\0\0\x36\0\0\0".to_vec()),
        ("image/tiff", b"II*\0\x08\0\0\0\0\0\0\0".to_vec()),
        ("image/heif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic".to_vec()),
        ("image/avif", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif".to_vec()),
        ("photoshop", b"8BPS\0\x01\0\0\0\0\0\0".to_vec()),
        ("application/pdf", b"%PDF-1.7\n%".to_vec()),
        ("", b"<svg xmlns=\"http://www.w3.org/2000/svg\"><script>alert(1)</script></svg>".to_vec()),
        ("application/zip", b"PK\x03\x04\x14\0\0\0".to_vec()),
        ("executable", b"MZ\x90\0\x03\0\0\0\x04\0\0\0".to_vec()),
        ("application/x-tar", tar),
        ("unknown", b"hello".to_vec()),
    ];
    for (name, file) in files {
        let refusal = refused(&file);
        assert_eq!((refusal.code, refusal.status), ("image-type-unsupported", 415), "{name}");
        assert!(refusal.message.contains(name), "{refusal}");
        assert!(refusal.message.ends_with("PNG, JPEG or WebP"), "{refusal}");
    }
}

// cases 9, 10
#[test]
fn nothing_of_a_file_is_kept_but_its_pixels() {
    let picture = DynamicImage::from(picture(300, 300));
    let secret = b"SERIAL-1234 GPS 52.5N 13.4E <script>";
    let exif = [tiff(true, &[(0x112, 3, 1, 1), (0x8825, 4, 1, 26)]), secret.to_vec()].concat();
    let extra = Extra { exif: Some(exif), icc: None };
    let tail = [b"PK\x03\x04<html>", &secret[..]].concat();
    let text = [b"Comment\0", &secret[..]].concat();
    let files = [
        [png_with(&picture, &extra), tail.clone()].concat(),
        [with_chunk(&png(picture.clone()), "tEXt", &text), tail.clone()].concat(),
        [jpeg_with(&picture, &extra), tail.clone()].concat(),
        [webp_with(&picture, &extra), tail].concat(),
    ];
    for file in files {
        assert!(file.windows(secret.len()).any(|bytes| bytes == secret));
        let photo = taken(&file);
        assert_eq!(chunks(&photo.png), ["IHDR", "IDAT", "IEND"]);
        assert!(!photo.png.windows(6).any(|bytes| bytes == b"SERIAL" || bytes == b"script"));
    }
}

// case 11
#[test]
fn all_eight_orientations_give_the_same_upright_image() {
    let upright = DynamicImage::from(picture(320, 260));
    for orientation in 1..=8 {
        let apply = Orientation::from_exif(orientation).unwrap();
        let undo = match apply {
            Orientation::Rotate90 => Orientation::Rotate270,
            Orientation::Rotate270 => Orientation::Rotate90,
            other => other,
        };
        let mut stored = upright.clone();
        stored.apply_orientation(undo);
        let extra = oriented(orientation.into());
        for (name, file, near) in [
            ("png", png_with(&stored, &extra), 0.0),
            ("webp", webp_with(&stored, &extra), 0.0),
            ("jpeg", jpeg_with(&stored, &extra), 8.0),
        ] {
            let apart = mean_distance(&pixels(&taken(&file)), &upright.to_rgb8());
            assert!(apart <= near, "{name}, orientation {orientation}: {apart}");
        }
    }
}

// case 12
#[test]
fn broken_orientations_count_as_none() {
    let upright = DynamicImage::from(picture(300, 260));
    let mut cyclic = tiff(false, &[(0x100, 3, 1, 6)]);
    let next = cyclic.len() - 4;
    cyclic[next..].copy_from_slice(&8_u32.to_le_bytes());
    let mut far = tiff(false, &[(0x112, 3, 1, 6)]);
    far[4..8].copy_from_slice(&0xFFFF_FFF0_u32.to_le_bytes());
    let mut many = tiff(true, &[(0x100, 3, 1, 6)]);
    many[8..10].copy_from_slice(&[0xFF, 0xFF]);
    let broken = [
        tiff(false, &[(0x112, 3, 1, 0)]),
        tiff(true, &[(0x112, 3, 1, 9)]),
        tiff(true, &[(0x112, 3, 1, 0xFFFF)]),
        tiff(false, &[(0x112, 4, 1, 6)]),
        cyclic,
        far,
        many,
        b"II*\0".to_vec(),
        b"nonsense".to_vec(),
        vec![0],
    ];
    for exif in broken {
        let extra = Extra { exif: Some(exif.clone()), icc: None };
        assert_eq!(distance(&pixels(&taken(&png_with(&upright, &extra))), &upright.to_rgb8()), 0, "{exif:?}");
        let photo = taken(&jpeg_with(&upright, &extra));
        assert_eq!((photo.width, photo.height), (300, 260), "{exif:?}");
    }
}

// case 13
#[test]
fn grey_palettes_and_sixteen_bits_keep_their_colours() {
    let grey = GrayImage::from_fn(256, 256, |x, _| Luma([x as u8]));
    let expected = DynamicImage::from(grey.clone()).into_rgb8();
    assert_eq!(distance(&pixels(&taken(&png(grey.clone()))), &expected), 0);
    assert!(distance(&pixels(&taken(&jpeg(grey.clone()))), &expected) <= 3);
    let half: ImageBuffer<LumaA<u8>, _> = ImageBuffer::from_pixel(256, 256, LumaA([0, 128]));
    assert_eq!(pixels(&taken(&png(half))).get_pixel(9, 9), &Rgb([127; 3]));

    let deep: ImageBuffer<Rgb<u16>, _> = ImageBuffer::from_pixel(256, 256, Rgb([65_535, 32_896, 257]));
    assert_eq!(pixels(&taken(&png(deep))).get_pixel(9, 9), &Rgb([255, 128, 1]));
    let deep: ImageBuffer<Luma<u16>, _> = ImageBuffer::from_pixel(256, 256, Luma([25_700]));
    assert_eq!(pixels(&taken(&png(deep))).get_pixel(9, 9), &Rgb([100; 3]));

    let palette = [chunk("PLTE", &[0, 0, 0, 250, 100, 7]), chunk("tRNS", &[0, 255])];
    for depth in [1, 2, 4, 8] {
        let row_bytes = 256 * u64::from(depth) / 8 + 1;
        let first = zeros(256 * row_bytes);
        let photo = taken(&png_of(256, 256, depth, 3, &palette[..1], &first));
        assert_eq!(pixels(&photo).get_pixel(9, 9), &Rgb([0; 3]), "{depth} bits");
        let photo = taken(&png_of(256, 256, depth, 3, &palette, &first));
        assert_eq!(pixels(&photo).get_pixel(9, 9), &Rgb([255; 3]), "{depth} bits, transparent");
    }
    let black = png_of(256, 256, 1, 0, &[], &zeros(256 * 33));
    assert_eq!(pixels(&taken(&black)).get_pixel(9, 9), &Rgb([0; 3]));
}

// case 13
#[test]
fn colour_profiles_are_brought_to_srgb() {
    // The red of sRGB, in the coordinates of Display P3.
    let wide = RgbImage::from_pixel(256, 256, Rgb([234, 51, 35]));
    let p3 = Extra { exif: None, icc: Some(ColorProfile::new_display_p3().encode().unwrap()) };
    let image = DynamicImage::from(wide.clone());
    let clear = DynamicImage::from(RgbaImage::from_pixel(256, 256, Rgba([234, 51, 35, 255])));
    let deep = DynamicImage::from(image.to_rgb16());
    let files = [
        png_with(&image, &p3),
        jpeg_with(&image, &p3),
        webp_with(&image, &p3),
        png_with(&clear, &p3),
        png_with(&deep, &p3),
    ];
    for (n, file) in files.iter().enumerate() {
        let Rgb([r, g, b]) = *pixels(&taken(file)).get_pixel(100, 100);
        assert!(r >= 252 && g <= 4 && b <= 4, "file {n}: {r} {g} {b}");
    }
    // A linear grey: half the light is level 188.
    let grey = DynamicImage::from(GrayImage::from_pixel(256, 256, Luma([128])));
    let linear = Extra { exif: None, icc: Some(ColorProfile::new_gray_with_gamma(1.0).encode().unwrap()) };
    let Rgb([level, ..]) = *pixels(&taken(&png_with(&grey, &linear))).get_pixel(100, 100);
    assert!(level.abs_diff(188) <= 2, "{level}");
    // Profiles that make no sense, or are for other pixels, are none.
    for icc in [b"nonsense".to_vec(), vec![0; 200], linear.icc.unwrap()] {
        let file = png_with(&image, &Extra { exif: None, icc: Some(icc) });
        assert_eq!(distance(&pixels(&taken(&file)), &wide), 0);
    }
}

// case 13
#[test]
fn cmyk_is_refused() {
    let refusal = refused(&flat_jpeg(300, 300, 0xC0, 4, 1));
    assert_eq!((refusal.code, refusal.status), ("image-color-unsupported", 422));
}

// case 14
#[test]
fn transparency_is_composited_on_white() {
    let clear = RgbaImage::from_fn(256, 256, |x, _| match x / 64 {
        0 => Rgba([200, 10, 10, 0]),
        1 => Rgba([0, 0, 0, 128]),
        2 => Rgba([10, 20, 30, 255]),
        _ => Rgba([255, 0, 0, 51]),
    });
    for file in [png(clear.clone()), webp(clear)] {
        let seen = pixels(&taken(&file));
        assert_eq!(seen.get_pixel(10, 10), &Rgb([255; 3]));
        assert_eq!(seen.get_pixel(70, 10), &Rgb([127; 3]));
        assert_eq!(seen.get_pixel(140, 10), &Rgb([10, 20, 30]));
        assert_eq!(seen.get_pixel(200, 10), &Rgb([255, 204, 204]));
    }
}

// case 15
#[test]
fn animations_are_refused() {
    let still = png(picture(300, 300));
    let control = [500_u32.to_be_bytes(), 0_u32.to_be_bytes()].concat();
    assert_eq!(refused(&with_chunk(&still, "acTL", &control)).code, "animated-not-supported");

    let riff = |name: &[u8; 4], data: &[u8]| {
        let padding = vec![0; data.len() % 2];
        [&name[..], &(data.len() as u32).to_le_bytes(), data, &padding].concat()
    };
    let side = &299_u32.to_le_bytes()[..3];
    let frame = [&[0; 6][..], side, side, &[100, 0, 0, 0], &webp(picture(300, 300))[12..]].concat();
    let body = [
        b"WEBP".to_vec(),
        riff(b"VP8X", &[&[2, 0, 0, 0], side, side].concat()),
        riff(b"ANIM", &[0; 6]),
        riff(b"ANMF", &frame),
        riff(b"ANMF", &frame),
    ];
    assert_eq!(refused(&riff(b"RIFF", &body.concat())).code, "animated-not-supported");
}

// case 16
#[test]
fn images_too_small_too_long_or_too_large_are_refused_with_the_limits() {
    let limits = Limits::default();
    for (width, height, code) in [
        (1, 1, "image-too-small"),
        (63, 63, "image-too-small"),
        (255, 300, "image-too-small"),
        (20_000, 1, "image-too-large"),
        (256, 1_025, "image-aspect"),
        (8_193, 4_000, "image-too-large"),
    ] {
        let files =
            [png_of(width, height, 8, 2, &[], &zeros(9)), flat_jpeg(width as u16, height as u16, 0xC0, 1, 1)];
        for file in files {
            let refusal = refused(&file);
            assert_eq!((refusal.code, refusal.status), (code, 422), "{width} x {height}");
            assert!(refusal.message.contains(&format!("{width} x {height}")), "{refusal}");
        }
    }
    taken(&png(picture(256, 1_024)));
    assert!(decode(&png(picture(64, 64)), &Limits { side_min: 64, ..limits }).is_ok());
}

// case 17
#[test]
fn the_same_image_twice_is_noticed_however_it_was_saved() {
    let base = picture(400, 300);
    let other = RgbImage::from_fn(400, 300, |x, y| {
        let inside = (f64::from(x) - 200.0).hypot(f64::from(y) - 150.0) < 90.0;
        if inside { Rgb([200, 60, (x / 2) as u8]) } else { Rgb([230, 230, 235]) }
    });
    let moved = RgbImage::from_fn(400, 300, |x, y| {
        let inside = (f64::from(x) - 110.0).hypot(f64::from(y) - 190.0) < 60.0;
        if inside { Rgb([200, 60, (x / 2) as u8]) } else { Rgb([230, 230, 235]) }
    });
    let resize =
        |image: &RgbImage| image::imageops::resize(image, 300, 260, image::imageops::FilterType::Triangle);
    let look = |file: &[u8]| taken(file).inspection;
    let same = [look(&png(other.clone())), look(&jpeg(other.clone())), look(&lossy_webp(&resize(&other)))];
    assert_eq!(duplicates(&same), [(0, 1), (0, 2), (1, 2)]);
    let mixed = [look(&png(base)), look(&png(other.clone())), look(&png(moved)), look(&png(other))];
    assert_eq!(duplicates(&mixed), [(1, 3)]);
    assert!(duplicates(&[]).is_empty());
}

// case 18
#[test]
fn images_that_show_nothing_are_accepted_with_a_warning() {
    let warned = |image: RgbImage| taken(&png(image)).inspection.warnings;
    let black = RgbImage::new(300, 300);
    assert_eq!(warned(black), [Warning::Dark, Warning::Uniform, Warning::Blurry]);
    assert_eq!(
        warned(RgbImage::from_pixel(300, 300, Rgb([90, 90, 200]))),
        [Warning::Uniform, Warning::Blurry]
    );
    let noise = RgbImage::from_fn(300, 300, |x, y| {
        let [r, g, b, ..] = random::derive(7, &format!("{x} {y}")).to_le_bytes();
        Rgb([r, g, b])
    });
    assert_eq!(warned(noise), []);
    let sharp = picture(600, 600);
    assert_eq!(warned(sharp.clone()), []);
    assert_eq!(warned(image::imageops::blur(&sharp, 12.0)), [Warning::Blurry]);
    // Out of focus, on a background that is not.
    let seen = taken(&png(sharp)).inspection;
    assert_eq!((seen.width, seen.height), (600, 600));
    assert!((0.2..0.8).contains(&seen.brightness), "{}", seen.brightness);
    assert_eq!(seen.hash.len(), 64);
}

// case 19
#[tokio::test]
async fn a_jpeg_of_a_thousand_scans_is_refused_undecoded_and_others_are_served() {
    let decoder = Decoder::new(Limits::default(), 1, Duration::from_mins(1));
    let bomb = flat_jpeg(4_000, 4_000, 0xC2, 3, 1_000);
    let refusals: Vec<_> =
        futures_util::future::join_all((0..20).map(|_| decoder.decode(bomb.clone().into()))).await;
    for refusal in refusals {
        let refusal = refusal.expect_err("a refusal");
        assert_eq!((refusal.code, refusal.status), ("image-too-complex", 422));
        assert!(refusal.message.contains("1000 scans"), "{refusal}");
    }
    // A progressive JPEG is no crime.
    let photo = decoder.decode(flat_jpeg(300, 280, 0xC2, 1, 1).into()).await.unwrap();
    assert_eq!((photo.width, photo.height), (300, 280));
    assert_eq!(pixels(&photo).get_pixel(150, 150), &Rgb([128; 3]));
}

// case 19
#[tokio::test]
async fn an_image_that_takes_too_long_is_refused_and_occupies_its_slot_until_it_is_decoded() {
    let decoder = Decoder::new(Limits::default(), 1, Duration::ZERO);
    let slow = bytes::Bytes::from(png_of(4_000, 4_000, 8, 2, &[], &zeros(4_000 * 12_001)));
    let refusal = decoder.decode(slow.clone()).await.unwrap_err();
    assert_eq!((refusal.code, refusal.status), ("image-too-complex", 422));
    let refusal = decoder.decode(slow.clone()).await.unwrap_err();
    assert_eq!((refusal.code, refusal.status), ("decoder-busy", 503));
    let deadline = Instant::now() + Duration::from_mins(1);
    while decoder.decode(slow.clone()).await.unwrap_err().code == "decoder-busy" {
        assert!(Instant::now() < deadline, "the slot does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Puts the right sums into a PNG that was changed, as far as its chunks can be followed.
fn mend(png: &mut [u8]) {
    let mut at = 8;
    while let Some(size) = png.get(at..at + 4) {
        let size = u32::from_be_bytes(size.try_into().unwrap()) as usize;
        let Some(end) = at.checked_add(size).and_then(|end| end.checked_add(8)) else { return };
        if end + 4 > png.len() {
            return;
        }
        let sum = crc32fast::hash(&png[at + 4..end]);
        png[end..end + 4].copy_from_slice(&sum.to_be_bytes());
        at = end + 4;
    }
}

// case 20
#[test]
fn no_bytes_crash_the_decoder() {
    let limits = Limits { side_min: 8, side_max: 512, pixels_max: 100_000, ..Limits::default() };
    let small = picture(24, 20);
    let extra = Extra { icc: Some(ColorProfile::new_display_p3().encode().unwrap()), ..oriented(6) };
    let image = DynamicImage::from(small.clone());
    let clear = DynamicImage::from(image.to_rgba8());
    let grey = DynamicImage::from(image.to_luma16());
    let good = [
        png_with(&image, &extra),
        png(clear.clone()),
        png(grey),
        jpeg_with(&image, &extra),
        jpeg(image.to_luma8()),
        flat_jpeg(24, 20, 0xC2, 1, 1),
        webp_with(&image, &extra),
        webp(clear),
        lossy_webp(&small),
    ];
    assert!(good.iter().all(|file| decode(file, &limits).is_ok()));

    let before = peak_mib();
    let (mut n_taken, mut n_refused) = (0, 0);
    for n in 0..20_000 {
        let mut draws = 0;
        let mut below = |n_choices: usize| {
            draws += 1;
            random::below(20, n, draws, n_choices)
        };
        let mut file = if below(10) == 0 {
            let head: [&[u8]; 4] = [b"", b"\x89PNG\r\n\x1a\n", b"\xFF\xD8\xFF", b"RIFF\xFF\0\0\0WEBPVP8 "];
            let noise: Vec<_> = (0..below(400)).map(|_| below(256) as u8).collect();
            [head[below(4)], &noise].concat()
        } else {
            good[below(good.len())].clone()
        };
        for _ in 0..=below(6) {
            let at = below(file.len().max(1));
            match below(6) {
                0 => file.truncate(at),
                1 => file.insert(at, below(256) as u8),
                2 if at < file.len() => drop(file.remove(at)),
                3 if at + 4 < file.len() => file[at..at + 4].fill([0, 0xFF, 0x7F][below(3)]),
                4 => file.extend_from_within(at..),
                _ if at < file.len() => file[at] ^= 1 << below(8),
                _ => {}
            }
        }
        if below(2) == 0 {
            mend(&mut file);
        }
        match decode(&file, &limits) {
            Ok(photo) => {
                n_taken += 1;
                assert!(photo.width.max(photo.height) <= 512, "file {n}");
                let read = image::ImageReader::new(Cursor::new(&photo.png)).with_guessed_format().unwrap();
                assert_eq!(read.into_dimensions().unwrap(), (photo.width, photo.height), "file {n}");
            }
            Err(refusal) => {
                n_refused += 1;
                assert!(matches!(refusal.status, 415 | 422), "file {n}");
                assert!(!refusal.message.contains('\n') && refusal.message.len() < 200, "file {n}");
            }
        }
    }
    assert!(n_taken > 1_000 && n_refused > 5_000, "{n_taken} taken, {n_refused} refused");
    assert!(peak_mib() - before < 300);
}
