//! Draws the four photos in examples/photos: one mug, cream with a red band and a blue dot, in four places. They are
//! there to try Hypnos with before one's own photos are at hand.
//!
//! `cargo run --example photos -- DIR`

use std::path::PathBuf;

use image::{Rgb, RgbImage};

/// Side of a photo, in pixels.
const SIDE: u32 = 320;

/// Samples along each axis of a pixel.
const SUPER: u32 = 3;

type Colour = [f64; 3];

const CREAM: Colour = [0.93, 0.88, 0.76];
const RED: Colour = [0.78, 0.12, 0.12];
const BLUE: Colour = [0.10, 0.22, 0.62];

/// Where the mug stands, and how it is seen.
struct Scene {
    /// Centre of the mug, in sides of the photo.
    at: (f64, f64),
    /// Half its width.
    size: f64,
    /// Tilt, in radians.
    tilt: f64,
    /// Which way the handle looks: 1 right, -1 left.
    handle: f64,
    /// Wall and table.
    ground: [Colour; 2],
    /// Height of the table's edge.
    horizon: f64,
    /// Where the light comes from: -1 left, 1 right.
    light: f64,
}

const SCENES: [Scene; 4] = [
    Scene {
        at: (0.47, 0.55),
        size: 0.22,
        tilt: 0.0,
        handle: 1.0,
        light: -0.6,
        horizon: 0.62,
        ground: [[0.80, 0.84, 0.86], [0.55, 0.36, 0.20]],
    },
    Scene {
        at: (0.54, 0.52),
        size: 0.26,
        tilt: 0.06,
        handle: -1.0,
        light: 0.5,
        horizon: 0.70,
        ground: [[0.36, 0.50, 0.40], [0.82, 0.80, 0.76]],
    },
    Scene {
        at: (0.45, 0.50),
        size: 0.19,
        tilt: -0.08,
        handle: 1.0,
        light: 0.7,
        horizon: 0.55,
        ground: [[0.92, 0.86, 0.60], [0.42, 0.44, 0.50]],
    },
    Scene {
        at: (0.52, 0.57),
        size: 0.24,
        tilt: 0.03,
        handle: 1.0,
        light: -0.2,
        horizon: 0.66,
        ground: [[0.52, 0.60, 0.74], [0.70, 0.56, 0.42]],
    },
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = PathBuf::from(std::env::args_os().nth(1).ok_or("wanted a directory")?);
    std::fs::create_dir_all(&dir)?;
    for (i, scene) in SCENES.iter().enumerate() {
        let photo = RgbImage::from_fn(SIDE, SIDE, |x, y| Rgb(pixel(scene, x, y)));
        let file = std::fs::File::create(dir.join(format!("mug-{}.jpg", i + 1)))?;
        image::codecs::jpeg::JpegEncoder::new_with_quality(file, 92).encode_image(&photo)?;
    }
    Ok(())
}

fn pixel(scene: &Scene, x: u32, y: u32) -> [u8; 3] {
    let mut sum = [0.0; 3];
    for i in 0..SUPER * SUPER {
        let at = |pixel: u32, i: u32| {
            (f64::from(pixel) + (f64::from(i) + 0.5) / f64::from(SUPER)) / f64::from(SIDE)
        };
        let colour = colour(scene, at(x, i % SUPER), at(y, i / SUPER));
        (0..3).for_each(|c| sum[c] += colour[c]);
    }
    sum.map(|value| (value / f64::from(SUPER * SUPER) * 255.0).clamp(0.0, 255.0) as u8)
}

fn colour(scene: &Scene, x: f64, y: f64) -> Colour {
    // Into the mug's own measure: u across, -1 to 1 from side to side; v down, -1.1 rim to 1.1 foot.
    let (dx, dy) = ((x - scene.at.0) / scene.size, (y - scene.at.1) / scene.size);
    let (sin, cos) = scene.tilt.sin_cos();
    let (u, v) = (cos * dx + sin * dy, cos * dy - sin * dx);
    mug(scene, u, v).unwrap_or_else(|| ground(scene, x, y))
}

fn mug(scene: &Scene, u: f64, v: f64) -> Option<Colour> {
    let rim = 0.22; // half the height of the rim's ellipse
    let inside = (u / 0.9).powi(2) + ((v + 1.1) / (rim * 0.85)).powi(2);
    if inside < 1.0 {
        return Some(shade(CREAM, 0.45 + 0.2 * (v + 1.1) / rim)); // looking into it
    }
    let below_rim = v + 1.1 > -rim * (1.0 - u * u).max(0.0).sqrt();
    let above_foot = v - 1.1 < rim * (1.0 - u * u).max(0.0).sqrt();
    if u.abs() <= 1.0 && below_rim && above_foot {
        let height = v - rim * (1.0 - u * u).max(0.0).sqrt(); // along the round wall
        let paint = if (-0.35..0.25).contains(&height) {
            let dot = (u - 0.1).hypot(height + 0.05);
            if dot < 0.2 { BLUE } else { RED }
        } else {
            CREAM
        };
        let normal = u - scene.light * 0.7;
        return Some(shade(paint, 0.55 + 0.5 * (1.0 - normal * normal / 2.4).max(0.0)));
    }
    let (hu, hv) = (u * scene.handle - 1.02, v - 0.05);
    let ring = (hu / 0.62).hypot(hv / 0.72);
    (hu > -0.1 && (0.66..1.0).contains(&ring)).then(|| shade(CREAM, 0.95 - 0.5 * (ring - 0.83).abs() / 0.17))
}

fn ground(scene: &Scene, x: f64, y: f64) -> Colour {
    let [wall, table] = scene.ground;
    if y < scene.horizon {
        return shade(wall, 1.0 - 0.25 * (x - 0.5 + 0.4 * scene.light).abs());
    }
    let foot = scene.at.1 + 1.2 * scene.size;
    let across = (x - scene.at.0 + 0.25 * scene.light * scene.size) / (1.35 * scene.size);
    let shadow = (across.powi(2) + ((y - foot) / (0.35 * scene.size)).powi(2)).min(1.0);
    shade(table, (0.75 + 0.25 * (y - scene.horizon)) * (0.45 + 0.55 * shadow))
}

fn shade(colour: Colour, light: f64) -> Colour {
    colour.map(|value| value * light)
}
