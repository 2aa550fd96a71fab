//! Draws product pictures with exact masks, for the miniature to learn from and for demo products.
//!
//! `render train OUT COUNT SEED` writes OUT.rgbm (COUNT x 128 x 128 x 4 bytes: red, green, blue, foreground) and
//! OUT.jsonl (what each shows). `render demo DIR` writes the demo products' photos as PPM files. Objects are signed
//! distance functions, marched along rays; four rays a pixel; one lamp with a soft shadow. Everything follows from the
//! seed. No crates.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::{Add, Mul, Sub};
use std::thread;

/// Side of a picture.
const SIDE: usize = 128;

#[derive(Clone, Copy, Debug)]
struct V(f32, f32, f32);

impl Add for V {
    type Output = V;
    fn add(self, o: V) -> V {
        V(self.0 + o.0, self.1 + o.1, self.2 + o.2)
    }
}

impl Sub for V {
    type Output = V;
    fn sub(self, o: V) -> V {
        V(self.0 - o.0, self.1 - o.1, self.2 - o.2)
    }
}

impl Mul<f32> for V {
    type Output = V;
    fn mul(self, s: f32) -> V {
        V(self.0 * s, self.1 * s, self.2 * s)
    }
}

impl V {
    fn dot(self, o: V) -> f32 {
        self.0 * o.0 + self.1 * o.1 + self.2 * o.2
    }
    fn len(self) -> f32 {
        self.dot(self).sqrt()
    }
    fn unit(self) -> V {
        self * (1.0 / self.len().max(1e-9))
    }
    fn cross(self, o: V) -> V {
        V(self.1 * o.2 - self.2 * o.1, self.2 * o.0 - self.0 * o.2, self.0 * o.1 - self.1 * o.0)
    }
}

fn mix(a: V, b: V, t: f32) -> V {
    a + (b - a) * t.clamp(0.0, 1.0)
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }
    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// What a thing is. The last two are demo products only.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Class {
    Mug,
    Vase,
    Chair,
    Lamp,
    Bottle,
    Robot,
    Teapot,
    Clock,
    ToyCar,
    Backpack,
    Lighthouse,
    Camera,
}

/// What training pictures show.
const CLASSES: [Class; 10] = [
    Class::Mug,
    Class::Vase,
    Class::Chair,
    Class::Lamp,
    Class::Bottle,
    Class::Robot,
    Class::Teapot,
    Class::Clock,
    Class::ToyCar,
    Class::Backpack,
];

impl Class {
    fn name(self) -> &'static str {
        match self {
            Class::Mug => "mug",
            Class::Vase => "vase",
            Class::Chair => "chair",
            Class::Lamp => "lamp",
            Class::Bottle => "bottle",
            Class::Robot => "robot",
            Class::Teapot => "teapot",
            Class::Clock => "clock",
            Class::ToyCar => "toy car",
            Class::Backpack => "backpack",
            Class::Lighthouse => "lighthouse",
            Class::Camera => "camera",
        }
    }
}

const COLOURS: [(&str, V); 8] = [
    ("red", V(0.80, 0.10, 0.10)),
    ("orange", V(0.96, 0.50, 0.08)),
    ("yellow", V(0.96, 0.84, 0.14)),
    ("green", V(0.14, 0.56, 0.20)),
    ("blue", V(0.12, 0.25, 0.78)),
    ("purple", V(0.48, 0.16, 0.64)),
    ("white", V(0.94, 0.94, 0.93)),
    ("black", V(0.09, 0.09, 0.10)),
];

/// What training pictures wear.
const PATTERNS: [&str; 3] = ["plain", "striped", "checkered"];
/// What demo products wear; of a bundle's parts the VAE alone learns from such pictures.
const OTHER_PATTERNS: [&str; 2] = ["dotted", "banded"];
const SCENES: [&str; 8] = ["table", "beach", "grass", "snow", "marble", "brick", "city", "forest"];

/// The plain backgrounds, by the names and values that views of photos have.
const PALETTE: [(&str, [u8; 3]); 12] = [
    ("red", [200, 40, 40]),
    ("orange", [235, 130, 40]),
    ("yellow", [240, 210, 60]),
    ("green", [60, 150, 70]),
    ("teal", [40, 150, 150]),
    ("blue", [50, 90, 190]),
    ("purple", [120, 60, 160]),
    ("pink", [240, 150, 180]),
    ("brown", [120, 80, 50]),
    ("black", [20, 20, 20]),
    ("white", [245, 245, 245]),
    ("grey", [128, 128, 128]),
];

/// What a picture shows and how.
struct Picture {
    class: Class,
    colours: [usize; 2],
    pattern: &'static str,
    /// A scene, or else a colour of the palette.
    scene: Option<usize>,
    plain: usize,
    /// Whether the thing is away, and the place is all there is.
    empty: bool,
    /// Whether the thing throws a shadow on a plain ground.
    shadow: bool,
    /// Sine and cosine of how far the thing is turned.
    turn: (f32, f32),
    pitch: f32,
    distance: f32,
    /// Where the camera looks, beside the middle of the thing.
    aim: (f32, f32),
    light: V,
    brightness: f32,
    seed: u64,
}

// ------------------------------------------------------------------------------------------------------------ shapes

fn sphere(p: V, r: f32) -> f32 {
    p.len() - r
}

fn brick(p: V, half: V, round: f32) -> f32 {
    let q = V(p.0.abs() - half.0 + round, p.1.abs() - half.1 + round, p.2.abs() - half.2 + round);
    V(q.0.max(0.0), q.1.max(0.0), q.2.max(0.0)).len() + q.0.max(q.1).max(q.2).min(0.0) - round
}

/// Upright, from -h to h.
fn cylinder(p: V, r: f32, h: f32) -> f32 {
    let (d, e) = ((p.0 * p.0 + p.2 * p.2).sqrt() - r, p.1.abs() - h);
    d.max(e).min(0.0) + (d.max(0.0).powi(2) + e.max(0.0).powi(2)).sqrt()
}

fn capsule(p: V, a: V, b: V, r: f32) -> f32 {
    let (pa, ba) = (p - a, b - a);
    let t = (pa.dot(ba) / ba.dot(ba)).clamp(0.0, 1.0);
    (pa - ba * t).len() - r
}

/// In the plane of x and y.
fn ring(p: V, big: f32, small: f32) -> f32 {
    (((p.0 * p.0 + p.1 * p.1).sqrt() - big).powi(2) + p.2 * p.2).sqrt() - small
}

/// A frustum of a cone from radius a at -h to b at h, a bound from below.
fn cone(p: V, a: f32, b: f32, h: f32) -> f32 {
    let r = a + (b - a) * ((p.1 / h + 1.0) * 0.5).clamp(0.0, 1.0);
    let slope = ((b - a) / (2.0 * h)).hypot(1.0);
    let side = ((p.0 * p.0 + p.2 * p.2).sqrt() - r) / slope;
    side.max(p.1.abs() - h)
}

/// Distance to a thing of this class, standing on y = 0, about two high, and which part of it is nearest: 0 wears the
/// pattern, 1 the second colour, 2 is dark.
fn shape(class: Class, p: V) -> (f32, u8) {
    let at = |x: f32, y: f32, z: f32| p - V(x, y, z);
    let mut best = (f32::MAX, 0);
    let mut part = |d: f32, kind: u8| {
        if d < best.0 {
            best = (d, kind);
        }
    };
    match class {
        Class::Mug => {
            let hollow = -cylinder(at(0.0, 1.0, 0.0), 0.56, 0.80);
            part(cylinder(at(-0.05, 0.8, 0.0), 0.68, 0.8).max(hollow), 0);
            part(ring(at(0.72, 0.82, 0.0), 0.40, 0.10), 1);
        }
        Class::Vase => {
            let (r, y) = ((p.0 * p.0 + p.2 * p.2).sqrt(), p.1.clamp(0.0, 2.0));
            let wide = 0.34 + 0.34 * (1.6 * y + 0.4).sin().max(-0.55);
            let side = (r - wide) * 0.62;
            part(side.max(p.1 - 2.0).max(-p.1), 0);
            part(ring(V(p.0, p.2, p.1 - 2.0), 0.22, 0.07), 1);
        }
        Class::Chair => {
            part(brick(at(0.0, 0.92, 0.0), V(0.62, 0.10, 0.58), 0.05), 0);
            part(brick(at(0.0, 1.55, -0.52), V(0.60, 0.58, 0.08), 0.05), 0);
            let leg = V(p.0.abs() - 0.52, p.1 - 0.45, p.2.abs() - 0.48);
            part(brick(leg, V(0.08, 0.46, 0.08), 0.02), 1);
        }
        Class::Lamp => {
            part(cone(at(0.0, 1.55, 0.0), 0.72, 0.36, 0.45), 0);
            part(cylinder(at(0.0, 0.7, 0.0), 0.07, 0.7), 1);
            part(cylinder(at(0.0, 0.07, 0.0), 0.46, 0.07) - 0.02, 1);
        }
        Class::Bottle => {
            part(capsule(p, V(0.0, 0.42, 0.0), V(0.0, 1.05, 0.0), 0.42), 0);
            part(cylinder(at(0.0, 1.62, 0.0), 0.15, 0.30), 0);
            part(cylinder(at(0.0, 1.96, 0.0), 0.19, 0.10), 1);
        }
        Class::Robot => {
            part(brick(at(0.0, 0.92, 0.0), V(0.48, 0.44, 0.34), 0.05), 0);
            part(brick(at(0.0, 1.66, 0.0), V(0.36, 0.28, 0.30), 0.05), 1);
            part(capsule(V(p.0.abs(), p.1, p.2), V(0.60, 1.20, 0.0), V(0.72, 0.62, 0.1), 0.11), 1);
            part(brick(V(p.0.abs() - 0.24, p.1 - 0.24, p.2), V(0.15, 0.25, 0.17), 0.03), 1);
            part(sphere(V(p.0.abs() - 0.15, p.1 - 1.70, p.2 - 0.30), 0.09), 2);
        }
        Class::Teapot => {
            part(sphere(V(p.0, (p.1 - 0.72) * 1.12, p.2), 0.72) * 0.88, 0);
            part(capsule(p, V(0.55, 0.62, 0.0), V(1.08, 1.12, 0.0), 0.13), 1);
            part(ring(at(-0.72, 0.78, 0.0), 0.38, 0.09), 1);
            part(sphere(at(0.0, 1.46, 0.0), 0.14), 1);
        }
        Class::Clock => {
            let round = V(p.0, p.2, p.1 - 1.0);
            part(cylinder(round, 0.92, 0.20), 0);
            part(cylinder(V(p.0, p.2 - 0.17, p.1 - 1.0), 0.70, 0.06), 1);
            part(capsule(p, V(0.0, 1.0, 0.26), V(0.0, 1.48, 0.26), 0.05), 2);
            part(capsule(p, V(0.0, 1.0, 0.26), V(0.34, 0.86, 0.26), 0.05), 2);
            part(capsule(V(p.0.abs(), p.1, p.2), V(0.45, 0.30, 0.0), V(0.58, 0.06, 0.0), 0.08), 1);
        }
        Class::ToyCar => {
            part(brick(at(0.0, 0.52, 0.0), V(1.08, 0.26, 0.50), 0.12), 0);
            part(brick(at(-0.08, 0.98, 0.0), V(0.56, 0.26, 0.42), 0.12), 1);
            let wheel = V(p.0.abs() - 0.66, p.2.abs() - 0.50, p.1 - 0.27);
            part(cylinder(wheel, 0.27, 0.10), 2);
        }
        Class::Backpack => {
            part(brick(at(0.0, 0.92, 0.0), V(0.66, 0.90, 0.36), 0.26), 0);
            part(brick(at(0.0, 0.58, 0.34), V(0.46, 0.38, 0.16), 0.12), 1);
            part(ring(at(0.0, 1.86, 0.0), 0.20, 0.06), 1);
        }
        Class::Lighthouse => {
            part(cone(at(0.0, 0.78, 0.0), 0.52, 0.34, 0.78), 0);
            part(cylinder(at(0.0, 1.60, 0.0), 0.46, 0.06), 2);
            part(cylinder(at(0.0, 1.78, 0.0), 0.26, 0.16), 1);
            part(cone(at(0.0, 2.06, 0.0), 0.36, 0.02, 0.14), 1);
        }
        Class::Camera => {
            part(brick(at(0.0, 0.70, 0.0), V(0.86, 0.56, 0.30), 0.10), 0);
            part(cylinder(V(p.0 - 0.12, p.2 - 0.40, p.1 - 0.66), 0.40, 0.26), 1);
            part(cylinder(V(p.0 - 0.12, p.2 - 0.62, p.1 - 0.66), 0.28, 0.08), 2);
            part(brick(at(-0.45, 1.32, 0.0), V(0.24, 0.12, 0.20), 0.05), 1);
        }
    }
    best
}

/// A box around a thing, and how much `shape` grows at least for each step away from the box: some shapes are bounds
/// from below.
struct Bounds {
    low: V,
    high: V,
    growth: f32,
}

fn bounds(class: Class) -> Bounds {
    let of = |low: V, high: V, growth: f32| Bounds { low, high, growth };
    match class {
        Class::Mug => of(V(-0.73, 0.0, -0.68), V(1.22, 1.6, 0.68), 1.0),
        Class::Vase => of(V(-0.68, 0.0, -0.68), V(0.68, 2.07, 0.68), 0.5),
        Class::Chair => of(V(-0.62, -0.01, -0.60), V(0.62, 2.13, 0.58), 1.0),
        Class::Lamp => of(V(-0.72, -0.02, -0.72), V(0.72, 2.0, 0.72), 0.65),
        Class::Bottle => of(V(-0.42, 0.0, -0.42), V(0.42, 2.06, 0.42), 1.0),
        Class::Robot => of(V(-0.83, -0.01, -0.34), V(0.83, 1.94, 0.39), 1.0),
        Class::Teapot => of(V(-1.19, 0.07, -0.72), V(1.21, 1.6, 0.72), 0.85),
        Class::Clock => of(V(-0.92, -0.02, -0.20), V(0.92, 1.92, 0.31), 1.0),
        Class::ToyCar => of(V(-1.08, 0.0, -0.60), V(1.08, 1.24, 0.60), 1.0),
        Class::Backpack => of(V(-0.66, 0.02, -0.36), V(0.66, 2.12, 0.50), 1.0),
        Class::Lighthouse => of(V(-0.52, 0.0, -0.52), V(0.52, 2.2, 0.52), 0.5),
        Class::Camera => of(V(-0.86, 0.14, -0.30), V(0.86, 1.44, 0.70), 1.0),
    }
}

impl Bounds {
    /// Where a ray, in the thing's own coordinates, enters the box widened by `margin` and where it leaves it.
    fn crossing(&self, from: V, ray: V, margin: f32) -> Option<(f32, f32)> {
        let axis = |from: f32, ray: f32, low: f32, high: f32| {
            let (a, b) = ((low - margin - from) / ray, (high + margin - from) / ray);
            (a.min(b), a.max(b))
        };
        let (x, y, z) = (
            axis(from.0, ray.0, self.low.0, self.high.0),
            axis(from.1, ray.1, self.low.1, self.high.1),
            axis(from.2, ray.2, self.low.2, self.high.2),
        );
        let (enter, leave) = (x.0.max(y.0).max(z.0).max(0.0), x.1.min(y.1).min(z.1));
        (enter <= leave).then_some((enter, leave))
    }
}

/// The colour of a point of the thing, before light.
fn paint(picture: &Picture, p: V, kind: u8) -> V {
    let [one, other] = picture.colours.map(|i| COLOURS[i].1);
    if kind == 2 {
        return V(0.07, 0.07, 0.08);
    }
    if kind == 1 {
        return other;
    }
    let around = p.2.atan2(p.0) / std::f32::consts::TAU;
    let even = |v: f32| v.floor().rem_euclid(2.0) < 1.0;
    let first = match picture.pattern {
        "striped" => even(p.1 * 3.2),
        "checkered" => even(p.1 * 2.6) == even(around * 8.0 + 0.5),
        "dotted" => {
            let (u, v) = ((around * 5.0).rem_euclid(1.0) - 0.5, (p.1 * 1.2).rem_euclid(1.0) - 0.5);
            u.hypot(v) > 0.3
        }
        "banded" => !(0.55..1.05).contains(&p.1),
        _ => true,
    };
    if first { one } else { other }
}

// ------------------------------------------------------------------------------------------------------------ scenes

fn noise(x: i32, y: i32, seed: u64) -> f32 {
    let mut dice = Dice(seed ^ ((x as u64) << 32 | u64::from(y as u32)).wrapping_mul(0x2545_F491_4F6C_DD1D));
    dice.unit()
}

/// Value noise between the points of a grid.
fn cloud(x: f32, y: f32, seed: u64) -> f32 {
    let (i, j) = (x.floor(), y.floor());
    let ease = |t: f32| t * t * (3.0 - 2.0 * t);
    let (u, v) = (ease(x - i), ease(y - j));
    let at = |a: f32, b: f32| noise((i + a) as i32, (j + b) as i32, seed);
    let (top, bottom) = (at(0.0, 0.0) * (1.0 - u) + at(1.0, 0.0) * u, at(0.0, 1.0) * (1.0 - u) + at(1.0, 1.0) * u);
    top * (1.0 - v) + bottom * v
}

/// The floor at a point of it.
fn floor(scene: &str, p: V, seed: u64) -> V {
    let (x, z) = (p.0, p.2);
    match scene {
        "table" => {
            let grain = cloud(x * 1.2, z * 9.0, seed) * 0.6 + cloud(x * 4.0, z * 30.0, seed) * 0.4;
            mix(V(0.48, 0.28, 0.13), V(0.68, 0.43, 0.22), grain)
        }
        "beach" => mix(V(0.82, 0.70, 0.46), V(0.94, 0.86, 0.64), cloud(x * 7.0, z * 7.0, seed)),
        "grass" => mix(V(0.12, 0.36, 0.08), V(0.40, 0.66, 0.20), cloud(x * 12.0, z * 6.0, seed)),
        "snow" => mix(V(0.84, 0.88, 0.95), V(0.97, 0.98, 1.0), cloud(x * 2.0, z * 2.0, seed)),
        "marble" => {
            let vein = (x * 2.0 + z + 3.0 * cloud(x * 1.6, z * 1.6, seed)).sin().abs();
            mix(V(0.55, 0.56, 0.60), V(0.93, 0.92, 0.91), vein * 3.0)
        }
        "brick" => mix(V(0.40, 0.40, 0.41), V(0.52, 0.52, 0.52), cloud(x * 5.0, z * 5.0, seed)),
        "city" => mix(V(0.07, 0.07, 0.10), V(0.15, 0.15, 0.20), cloud(x * 4.0, z * 4.0, seed)),
        _ => mix(V(0.20, 0.14, 0.07), V(0.36, 0.27, 0.13), cloud(x * 6.0, z * 6.0, seed)),
    }
}

/// What lies beyond the floor, by a ray's angles.
fn beyond(scene: &str, ray: V, seed: u64) -> V {
    let (across, up) = (ray.0.atan2(-ray.2) * 4.0, ray.1.asin() * 6.0);
    match scene {
        "table" => mix(V(0.86, 0.80, 0.70), V(0.76, 0.69, 0.58), (across * 2.0).sin() * 0.5 + 0.5),
        "beach" if up < 0.5 => mix(V(0.05, 0.34, 0.60), V(0.18, 0.58, 0.78), cloud(across * 2.0, up * 14.0, seed)),
        "beach" => mix(V(0.62, 0.82, 0.96), V(0.36, 0.62, 0.92), up * 0.4),
        "grass" => mix(V(0.70, 0.86, 0.98), V(0.42, 0.66, 0.94), up * 0.5),
        "snow" => {
            let hills = 0.5 + 0.5 * (across * 1.3 + noise(1, 1, seed) * 6.0).sin();
            if up < hills { V(0.70, 0.77, 0.87) } else { V(0.83, 0.88, 0.95) }
        }
        "marble" => mix(V(0.64, 0.67, 0.70), V(0.56, 0.59, 0.63), up * 0.6),
        "brick" => {
            let row = (up * 1.8).floor();
            let (u, v) = ((across + row * 0.5).rem_euclid(1.0), (up * 1.8).rem_euclid(1.0));
            let joint = u < 0.06 || v < 0.15;
            let tone = noise((across + row * 0.5).floor() as i32, row as i32, seed);
            if joint { V(0.68, 0.58, 0.52) } else { mix(V(0.52, 0.19, 0.13), V(0.70, 0.30, 0.21), tone) }
        }
        "city" => {
            let (column, row) = ((across * 1.4).floor(), (up * 1.9).floor());
            let (u, v) = ((across * 1.4).rem_euclid(1.0), (up * 1.9).rem_euclid(1.0));
            let window = (0.25..0.75).contains(&u) && (0.3..0.75).contains(&v);
            let lit = noise(column as i32, row as i32, seed) > 0.45;
            if window && lit { V(0.98, 0.84, 0.42) } else { V(0.05, 0.06, 0.14) }
        }
        _ => {
            let trunk = (across * 1.7 + noise(3, 3, seed)).rem_euclid(1.0) < 0.28;
            let leaves = mix(V(0.05, 0.22, 0.08), V(0.18, 0.42, 0.16), cloud(across * 5.0, up * 5.0, seed));
            if trunk { V(0.23, 0.15, 0.09) } else { leaves }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ light

fn turned(p: V, (s, c): (f32, f32)) -> V {
    V(c * p.0 - s * p.2, p.1, s * p.0 + c * p.2)
}

/// Where a ray first meets the thing. Outside its box there is nothing to meet.
fn march(picture: &Picture, from: V, ray: V) -> Option<f32> {
    if picture.empty {
        return None;
    }
    let (from, ray) = (turned(from, picture.turn), turned(ray, picture.turn));
    let (mut t, leave) = bounds(picture.class).crossing(from, ray, 0.02)?;
    for _ in 0..90 {
        let (d, _) = shape(picture.class, from + ray * t);
        if d < 0.0015 {
            return Some(t);
        }
        t += d * 0.85;
        if t > leave {
            break;
        }
    }
    None
}

/// How far from the lamp's ray, in lengths of the way to it, the thing's shadow ends.
const PENUMBRA: f32 = 1.0 / 7.0;
/// How far shadows reach.
const SHADOW: f32 = 5.0;

/// How much of the lamp reaches a point: 0 in the shadow, 1 outside it.
fn lit(picture: &Picture, from: V) -> f32 {
    if picture.empty {
        return 1.0;
    }
    let (from, ray) = (turned(from, picture.turn), turned(picture.light, picture.turn));
    // Beyond `last` the ray is too far from the thing's box for any shade; two looks narrow that down.
    let (bounds, mut last) = (bounds(picture.class), SHADOW);
    for _ in 0..3 {
        match bounds.crossing(from, ray, last * PENUMBRA / bounds.growth) {
            Some((_, leave)) => last = last.min(leave),
            None => return 1.0,
        }
    }
    let (mut t, mut light) = (0.03, 1.0f32);
    for _ in 0..24 {
        let (d, _) = shape(picture.class, from + ray * t);
        light = light.min(d / (t * PENUMBRA));
        if light < 0.01 {
            return 0.0;
        }
        t += d.clamp(0.04, 0.5);
        if t > last {
            break;
        }
    }
    light.clamp(0.0, 1.0)
}

/// Colour of a ray, and whether it met the thing.
fn trace(picture: &Picture, from: V, ray: V) -> (V, bool) {
    if let Some(t) = march(picture, from, ray) {
        let p = from + ray * t;
        let local = turned(p, picture.turn);
        let (d, kind) = shape(picture.class, local);
        let slope = |dx: f32, dy: f32, dz: f32| shape(picture.class, local + V(dx, dy, dz)).0 - d;
        let e = 0.003;
        let back = (-picture.turn.0, picture.turn.1);
        let normal = turned(V(slope(e, 0.0, 0.0), slope(0.0, e, 0.0), slope(0.0, 0.0, e)).unit(), back);
        let facing = normal.dot(picture.light);
        let diffuse = if facing > 0.0 { facing * (0.35 + 0.65 * lit(picture, p + normal * 0.02)) } else { 0.0 };
        let shine = (normal.dot((picture.light - ray).unit())).max(0.0).powi(24) * 0.18;
        let colour = paint(picture, local, kind) * (0.48 + 0.16 * normal.1 + 0.56 * diffuse);
        return (colour * picture.brightness + V(shine, shine, shine), true);
    }
    let ground = if ray.1 < -1e-4 { Some(from.1 / -ray.1) } else { None };
    let at = ground.map(|t| from + ray * t);
    let Some(scene) = picture.scene.map(|i| SCENES[i]) else {
        let plain = PALETTE[picture.plain].1.map(|v| f32::from(v) / 255.0);
        let shade = match at {
            Some(p) if picture.shadow && p.len() < 5.0 => 0.72 + 0.28 * lit(picture, p),
            _ => 1.0,
        };
        return (V(plain[0], plain[1], plain[2]) * shade, false);
    };
    match at {
        Some(p) if p.2 > -5.0 => {
            let near = if p.len() < 5.0 { lit(picture, p) } else { 1.0 };
            (floor(scene, p, picture.seed) * ((0.55 + 0.45 * near) * picture.brightness), false)
        }
        _ => (beyond(scene, ray, picture.seed) * picture.brightness, false),
    }
}

/// Pixels and mask, row by row: red, green, blue, foreground.
fn render(picture: &Picture, side: usize) -> Vec<u8> {
    let (s, c) = picture.pitch.sin_cos();
    let from = V(0.0, 0.95 + s * picture.distance, c * picture.distance);
    let ahead = (V(picture.aim.0, 0.95 + picture.aim.1, 0.0) - from).unit();
    let right = ahead.cross(V(0.0, 1.0, 0.0)).unit();
    let up = right.cross(ahead);
    let mut out = Vec::with_capacity(side * side * 4);
    for y in 0..side {
        for x in 0..side {
            let (mut sum, mut hits) = (V(0.0, 0.0, 0.0), 0);
            for sub in 0..4 {
                let place = |i: usize, k: i32| (i as f32 + 0.25 + 0.5 * k as f32) / side as f32 - 0.5;
                let (u, v) = (place(x, sub % 2), place(y, sub / 2));
                let ray = (ahead * 1.55 + right * u - up * v).unit();
                let (colour, hit) = trace(picture, from, ray);
                sum = sum + colour;
                hits += i32::from(hit);
            }
            let byte = |v: f32| (v / 4.0 * 255.0).round().clamp(0.0, 255.0) as u8;
            out.extend([byte(sum.0), byte(sum.1), byte(sum.2), (hits * 255 / 4) as u8]);
        }
    }
    out
}

// ------------------------------------------------------------------------------------------------------------ what

fn random_picture(dice: &mut Dice, patterns: &[&'static str]) -> Picture {
    let pattern = patterns[dice.below(patterns.len())];
    let one = dice.below(COLOURS.len());
    // A plain thing is of one colour more often than not; a patterned one has two.
    let other = if pattern == "plain" && dice.unit() < 0.5 { one } else { (one + 1 + dice.below(COLOURS.len() - 1)) % COLOURS.len() };
    let scene = (dice.unit() < 0.6).then(|| dice.below(SCENES.len()));
    let class = CLASSES[dice.below(CLASSES.len())];
    seen(dice, class, [one, other], pattern, scene)
}

/// A camera and a lamp for a thing in a place.
fn seen(dice: &mut Dice, class: Class, colours: [usize; 2], pattern: &'static str, scene: Option<usize>) -> Picture {
    let light = V(dice.between(-0.9, 0.9), dice.between(0.8, 1.4), dice.between(0.3, 1.0)).unit();
    Picture {
        class,
        colours,
        pattern,
        scene,
        plain: dice.below(PALETTE.len()),
        empty: false,
        shadow: dice.unit() < 0.4,
        turn: dice.between(-0.7, 0.7).sin_cos(),
        pitch: dice.between(0.12, 0.42),
        distance: dice.between(4.1, 5.6),
        aim: (dice.between(-0.3, 0.3), dice.between(-0.22, 0.22)),
        light,
        brightness: dice.between(0.88, 1.08),
        seed: dice.next(),
    }
}

fn describe(picture: &Picture) -> String {
    let [one, other] = picture.colours.map(|i| COLOURS[i].0);
    let (place, plain) = match picture.scene {
        Some(scene) => (SCENES[scene], false),
        None => (PALETTE[picture.plain].0, true),
    };
    format!(
        "{{\"class\": \"{}\", \"colour\": \"{one}\", \"second\": \"{other}\", \"pattern\": \"{}\", \"place\": \"{place}\", \"plain\": {plain}}}",
        picture.class.name(),
        picture.pattern
    )
}

/// One that wears another pattern than training pictures do, and is no demo product.
fn other_picture(dice: &mut Dice) -> Picture {
    loop {
        let picture = random_picture(dice, &OTHER_PATTERNS);
        let is_it = |&(_, class, colours, pattern): &Product| (class, colours, pattern) == (picture.class, picture.colours, picture.pattern);
        if !PRODUCTS.iter().any(is_it) {
            return picture;
        }
    }
}

fn train(what: &str, out: &str, count: usize, seed: u64) -> std::io::Result<()> {
    let mut pixels = BufWriter::new(File::create(format!("{out}.rgbm"))?);
    let mut words = BufWriter::new(File::create(format!("{out}.jsonl"))?);
    let picture = |i: usize| {
        let dice = &mut Dice(seed.wrapping_mul(1_000_003).wrapping_add(i as u64));
        match what {
            "other" => other_picture(dice),
            "empty" => Picture { empty: true, ..random_picture(dice, &PATTERNS) },
            _ => random_picture(dice, &PATTERNS),
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    for start in (0..count).step_by(100) {
        let pictures: Vec<Picture> = (start..count.min(start + 100)).map(picture).collect();
        let drawn: Vec<Vec<u8>> = thread::scope(|scope| {
            let parts = pictures.chunks(pictures.len().div_ceil(threads));
            let parts = parts.map(|part| scope.spawn(move || part.iter().map(|picture| render(picture, SIDE)).collect::<Vec<_>>()));
            let parts: Vec<_> = parts.collect();
            parts.into_iter().flat_map(|part| part.join().expect("drawn")).collect()
        });
        for (picture, drawn) in pictures.iter().zip(drawn) {
            pixels.write_all(&drawn)?;
            writeln!(words, "{}", describe(picture))?;
        }
        if start % 1000 == 900 {
            eprintln!("{} of {count}", start + 100);
        }
    }
    pixels.flush()?;
    words.flush()
}

type Product = (&'static str, Class, [usize; 2], &'static str);
/// A dozen products that no training picture shows: two other patterns, and two other shapes.
const PRODUCTS: [Product; 12] = [
    ("dotted-mug", Class::Mug, [6, 0], "dotted"),
    ("banded-vase", Class::Vase, [4, 2], "banded"),
    ("banded-robot", Class::Robot, [6, 0], "banded"),
    ("dotted-teapot", Class::Teapot, [2, 4], "dotted"),
    ("lighthouse", Class::Lighthouse, [6, 0], "striped"),
    ("dotted-car", Class::ToyCar, [2, 0], "dotted"),
    ("dotted-robot", Class::Robot, [2, 4], "dotted"),
    ("camera", Class::Camera, [7, 1], "plain"),
    ("banded-mug", Class::Mug, [4, 1], "banded"),
    ("dotted-vase", Class::Vase, [5, 2], "dotted"),
    ("banded-teapot", Class::Teapot, [0, 6], "banded"),
    ("dotted-lamp", Class::Lamp, [2, 0], "dotted"),
];

/// Where a seller puts them: each product in one place.
const SETS: [&str; 4] = ["table", "marble", "snow", "beach"];

/// Four photos of each product from near by, 256 pixels a side, as PPM.
fn demo(dir: &str) -> std::io::Result<()> {
    for (i, (name, class, colours, pattern)) in PRODUCTS.iter().enumerate() {
        fs::create_dir_all(format!("{dir}/{name}"))?;
        let scene = SCENES.iter().position(|scene| *scene == SETS[i % SETS.len()]);
        for photo in 0..4 {
            let mut dice = Dice(7_000 + 10 * i as u64 + photo);
            let picture = seen(&mut dice, *class, *colours, pattern, scene);
            let near = Picture { distance: 4.3 + 0.4 * (picture.distance - 4.1), aim: (picture.aim.0 * 0.5, 0.0), ..picture };
            let pixels = render(&near, 2 * SIDE);
            let mut file = BufWriter::new(File::create(format!("{dir}/{name}/{}.ppm", photo + 1))?);
            write!(file, "P6 {0} {0} 255\n", 2 * SIDE)?;
            for pixel in pixels.chunks_exact(4) {
                file.write_all(&pixel[..3])?;
            }
        }
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        [what @ ("train" | "empty" | "other"), out, count, seed] => {
            let number = |text: &str| text.parse().expect("COUNT and SEED are numbers");
            train(what, out, number(count) as usize, number(seed))
        }
        ["demo", dir] => demo(dir),
        _ => {
            eprintln!("wanted: render train|empty|other OUT COUNT SEED, or render demo DIR");
            std::process::exit(2)
        }
    }
}
