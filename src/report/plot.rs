//! Curves as SVG: a thin line through all points, a thick one through their moving mean. Colours are the page's, for
//! its light and its dark form alike.

use maud::{Markup, PreEscaped, html};

use super::document::LossCurve;

/// Width and height of a panel, in its own units.
const PANEL: (f64, f64) = (520.0, 240.0);
/// Left, top, right and bottom of the area of the curve; the rest is for labels.
const AREA: [f64; 4] = [56.0, 30.0, 508.0, 212.0];

/// One list of a [`LossCurve`]: the title of its panel, and the values.
type Column = (&'static str, fn(&LossCurve) -> &[Option<f64>]);

/// Every list of a [`LossCurve`] that has a panel.
const COLUMNS: [Column; 8] = [
    ("total", |curve| &curve.loss),
    ("reconstruction (eq. 2)", |curve| &curve.reconstruction),
    ("prior preservation (eq. 4)", |curve| &curve.prior),
    ("perceptual (eq. 5)", |curve| &curve.perceptual),
    ("adversarial (eq. 7)", |curve| &curve.adversarial),
    ("discriminator's own loss", |curve| &curve.discriminator),
    ("norm of the gradients", |curve| &curve.grad_norm),
    ("share of exponents cut", |curve| &curve.cut),
];

/// The part of the page's style that a picture of its own needs.
const STYLE: &str = "svg{color:#1c1e21;background:#fff;font:13px system-ui,sans-serif}\
    @media(prefers-color-scheme:dark){svg{color:#e6e6e6;background:#16181c}}\
    .rule{stroke:currentColor;stroke-opacity:.15}.plot text{fill:currentColor}\
    .raw{stroke:currentColor;stroke-opacity:.25;fill:none}.mean{stroke:#3b7ddd;stroke-width:2;fill:none}\
    .dot{fill:#3b7ddd}";

/// Points of a curve, by rising x.
type Points = Vec<(f64, f64)>;

/// A panel for each loss that was computed.
pub(super) fn losses(curve: &LossCurve) -> Vec<Markup> {
    let points = |values: &[Option<f64>]| -> Points {
        curve.step.iter().zip(values).filter_map(|(&step, value)| Some((step as f64, (*value)?))).collect()
    };
    let panels = COLUMNS.iter().map(|(title, values)| (title, points(values(curve))));
    panels.filter(|(_, points)| !points.is_empty()).map(|(title, points)| panel(title, &points)).collect()
}

/// The same panels as one picture of its own, two in a row.
pub fn losses_svg(curve: &LossCurve) -> String {
    let panels = losses(curve);
    let (width, height) = (2.0 * PANEL.0, panels.len().div_ceil(2).max(1) as f64 * PANEL.1);
    let svg = html! {
        svg xmlns="http://www.w3.org/2000/svg" viewBox={ "0 0 " (width) " " (height) } {
            style { (PreEscaped(STYLE)) }
            @for (i, panel) in panels.iter().enumerate() {
                g transform={ "translate(" ((i % 2) as f64 * PANEL.0) " " ((i / 2) as f64 * PANEL.1) ")" } {
                    svg width=(PANEL.0) height=(PANEL.1) { (panel) }
                }
            }
        }
    };
    svg.into_string()
}

/// One curve with its title and its axes.
pub(super) fn panel(title: &str, curve: &[(f64, f64)]) -> Markup {
    let (x, y) = (Axis::of(curve.iter().map(|p| p.0)), Axis::of(curve.iter().map(|p| p.1)));
    let [left, top, right, bottom] = AREA;
    let across = |value: f64| left + x.place(value) * (right - left);
    let up = |value: f64| bottom - y.place(value) * (bottom - top);
    let line = |points: &[(f64, f64)]| -> String {
        points.iter().map(|p| format!("{:.1},{:.1}", across(p.0), up(p.1))).collect::<Vec<_>>().join(" ")
    };
    html! {
        svg class="plot" role="img" aria-label=(title) viewBox={ "0 0 " (PANEL.0) " " (PANEL.1) } {
            text x=(left) y="18" { (title) }
            @for tick in y.ticks() {
                line class="rule" x1=(left) x2=(right) y1=(up(tick)) y2=(up(tick)) {}
                text x=(left - 6.0) y=(up(tick) + 4.0) text-anchor="end" { (number(tick)) }
            }
            @for tick in x.ticks() {
                text x=(across(tick)) y=(bottom + 18.0) text-anchor="middle" { (number(tick)) }
            }
            @if curve.len() > 8 {
                polyline class="raw" points=(line(curve)) {}
                polyline class="mean" points=(line(&smooth(curve))) {}
            } @else {
                polyline class="mean" points=(line(curve)) {}
                @for point in curve { circle class="dot" cx=(across(point.0)) cy=(up(point.1)) r="4" {} }
            }
        }
    }
}

/// The span of an axis.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        if high > low { Self { low, high } } else { Self { low: low - 0.5, high: low + 0.5 } }
    }

    /// Where a value lies, in 0..1.
    fn place(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    /// Round numbers along it, about three to seven.
    fn ticks(&self) -> Vec<f64> {
        let rough = (self.high - self.low) / 5.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(10.0 * power);
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// A tick's number, short.
fn number(value: f64) -> String {
    if value != 0.0 && (value.abs() >= 1e5 || value.abs() < 1e-3) {
        return format!("{value:.0e}");
    }
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The mean of the points around each, a twentieth of all.
fn smooth(curve: &[(f64, f64)]) -> Points {
    let reach = curve.len() / 40;
    let mean = |i: usize| {
        let near = &curve[i.saturating_sub(reach)..(i + reach + 1).min(curve.len())];
        near.iter().map(|p| p.1).sum::<f64>() / near.len() as f64
    };
    curve.iter().enumerate().map(|(i, p)| (p.0, mean(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_has_a_panel_if_it_was_computed() {
        let step: Vec<u64> = (1..=50).collect();
        let loss = step.iter().map(|&step| Some(1.0 / step as f64)).collect();
        let svg = losses_svg(&LossCurve { step, loss, prior: vec![None; 50], ..LossCurve::default() });
        assert!(svg.contains(">total<") && !svg.contains("prior"), "{svg}");
        assert_eq!(svg.matches("<polyline").count(), 2, "all points, and their mean");
    }

    #[test]
    fn a_curve_is_smoothed_over_a_twentieth_of_it() {
        let curve: Points = (0..100).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let smooth = smooth(&curve);
        assert!((smooth[50].1 - 0.5).abs() < 0.11, "{:?}", smooth[50]);
    }

    #[test]
    fn ticks_are_round_and_lie_within() {
        let ticks = |low, high| Axis { low, high }.ticks();
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(1.0, 800.0), [200.0, 400.0, 600.0, 800.0]);
        assert_eq!(ticks(-0.9, 0.9), [-0.5, 0.0, 0.5]);
        let flat = Axis::of([3.0, 3.0].into_iter());
        assert!(flat.ticks().contains(&3.0) && (flat.place(3.0) - 0.5).abs() < 1e-12);
        assert_eq!(["0.25", "1000", "1e-5"], [0.25, 1000.0, 1e-5].map(number).each_ref().map(String::as_str));
    }

    #[test]
    fn a_single_point_is_drawn_in_the_middle() {
        let svg = panel("score", &[(5.0, 0.7)]).into_string();
        assert!(svg.contains("cx=\"282\"") && svg.contains("cy=\"121\""), "{svg}");
    }
}
