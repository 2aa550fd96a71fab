//! The losses of a training as a picture: one panel for each, thin as they came, thick as they went on average.

use plotters::prelude::*;
use serde_json::Value;

/// Pixels of a panel.
const PANEL: (u32, u32) = (520, 240);

/// What is drawn, and what it is called.
const PANELS: [(&str, &str); 8] = [
    ("loss", "total"),
    ("reconstruction", "reconstruction (eq. 2)"),
    ("prior", "prior preservation (eq. 4)"),
    ("perceptual", "perceptual (eq. 5)"),
    ("adversarial", "latent discriminator (eq. 7)"),
    ("critic", "the discriminator's own"),
    ("grad_norm", "norm of the gradients"),
    ("cut", "share of exponents cut"),
];

type Drawing<T> = Result<T, Box<dyn std::error::Error>>;

/// An SVG of the losses in the lines of a log. Losses that were never computed have no panel.
pub(super) fn losses(steps: &[Value]) -> Drawing<String> {
    let curves = PANELS.iter().map(|&(name, title)| (title, curve(steps, name)));
    let curves: Vec<_> = curves.filter(|(_, curve)| !curve.is_empty()).collect();
    let n_rows = curves.len().div_ceil(2).max(1);
    let mut svg = String::new();
    {
        let root =
            SVGBackend::with_string(&mut svg, (2 * PANEL.0, n_rows as u32 * PANEL.1)).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, (title, curve)) in root.split_evenly((n_rows, 2)).iter().zip(&curves) {
            panel(area, title, curve)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    curve: &[(f64, f64)],
) -> Drawing<()> {
    let span = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        if high > low { low..high } else { low - 0.5..low + 0.5 }
    };
    let (x, y) = (span(&mut curve.iter().map(|p| p.0)), span(&mut curve.iter().map(|p| p.1)));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(56)
        .build_cartesian_2d(x, y)?;
    chart.configure_mesh().x_labels(6).y_labels(5).light_line_style(WHITE).draw()?;
    chart.draw_series(LineSeries::new(curve.iter().copied(), RGBColor(190, 205, 225).stroke_width(1)))?;
    chart.draw_series(LineSeries::new(smooth(curve), RGBColor(30, 80, 160).stroke_width(2)))?;
    Ok(())
}

fn curve(steps: &[Value], name: &str) -> Vec<(f64, f64)> {
    steps.iter().filter_map(|line| Some((line["step"].as_f64()?, line[name].as_f64()?))).collect()
}

/// The mean of the steps around each, a twentieth of all.
fn smooth(curve: &[(f64, f64)]) -> Vec<(f64, f64)> {
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
    use serde_json::json;

    #[test]
    fn a_loss_has_a_panel_if_it_was_computed() {
        let steps: Vec<Value> =
            (1..=50).map(|i| json!({ "step": i, "loss": 1.0 / f64::from(i), "prior": null })).collect();
        let svg = losses(&steps).expect("a picture");
        assert!(svg.contains("total") && !svg.contains("prior"), "{svg}");
    }

    #[test]
    fn a_curve_is_smoothed_over_a_twentieth_of_it() {
        let curve: Vec<(f64, f64)> = (0..100).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let smooth = smooth(&curve);
        assert!((smooth[50].1 - 0.5).abs() < 0.11, "{:?}", smooth[50]);
    }
}
