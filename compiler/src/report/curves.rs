//! Curves of a run over the tokens that it has seen, each an SVG inside the page.
//!
//! Colors of text and grid come from the page's style sheet, so that they fit a dark page too.

use plotters::coord::Shift;
use plotters::prelude::*;

/// Size of a curve in its own units; the page scales it.
const SIZE: (u32, u32) = (640, 240);

/// Most points of a line: more than pixels would only make the page large.
const POINTS: usize = 640;

/// Means are over this share of the run.
const SMOOTH: usize = 25;

const INK: RGBColor = RGBColor(0x4a, 0x7f, 0xd6);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// A curve of `values` over `tokens` (both one for each step) as an SVG element; `label` names its vertical axis.
///
/// `None` where there is nothing to draw: fewer than two steps, a value that is not finite, or zeros alone.
pub fn curve(label: &str, tokens: &[u64], values: &[f64]) -> Option<String> {
    let (low, high) = values.iter().fold((0f64, 0f64), |(low, high), x| (low.min(*x), high.max(*x)));
    let drawable = tokens.len() == values.len() && values.len() >= 2 && low < high;
    if !drawable || !values.iter().all(|value| value.is_finite()) {
        return None;
    }
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    let drawn = draw(&area, label, tokens, values, low..high);
    drop(area);
    drawn.ok().map(|()| svg)
}

fn draw(area: &Area<'_>, label: &str, tokens: &[u64], values: &[f64], range: std::ops::Range<f64>) -> Drawn {
    let last = tokens.last().copied().unwrap_or(1) as f64;
    let window = values.len() / SMOOTH;
    let smooth = window > 1;
    // A legend lies above the curves.
    let room = (range.end - range.start) * if smooth { 0.25 } else { 0.05 };
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .x_label_area_size(34)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..last, range.start..range.end + room)?;
    chart
        .configure_mesh()
        .x_labels(8)
        .y_labels(6)
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 12))
        .axis_desc_style(("sans-serif", 12))
        .x_desc("tokens")
        .y_desc(label)
        .x_label_formatter(&|tokens| amount(*tokens))
        .y_label_formatter(&|value| amount(*value))
        .draw()?;

    let each = INK.mix(if smooth { 0.35 } else { 1.0 });
    chart
        .draw_series(LineSeries::new(thinned(tokens, values), each.stroke_width(1)))?
        .label("each step")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], each.stroke_width(1)));
    if smooth {
        chart
            .draw_series(LineSeries::new(thinned(tokens, &means(values, window)), INK.stroke_width(2)))?
            .label(format!("mean of {window} steps"))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], INK.stroke_width(2)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 12))
            .draw()?;
    }
    area.present()
}

/// At most [`POINTS`] points: the mean of the steps that fall on each.
fn thinned(tokens: &[u64], values: &[f64]) -> Vec<(f64, f64)> {
    let per_point = values.len().div_ceil(POINTS);
    let chunks = tokens.chunks(per_point).zip(values.chunks(per_point));
    chunks.map(|(tokens, values)| (tokens[tokens.len() / 2] as f64, mean(values))).collect()
}

/// The mean of each value and the `window - 1` before it, as far as there are any.
fn means(values: &[f64], window: usize) -> Vec<f64> {
    (1..=values.len()).map(|end| mean(&values[end.saturating_sub(window)..end])).collect()
}

/// The arithmetic mean; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// A number as an axis shows it: `0.0006` as `600u`, 120000 as `120k`.
fn amount(value: f64) -> String {
    let size = value.abs();
    let (scale, unit) = match size {
        _ if size >= 999.5e6 => (1e-9, "G"),
        _ if size >= 999.5e3 => (1e-6, "M"),
        _ if size >= 999.5 => (1e-3, "k"),
        _ if size >= 0.01 || size == 0.0 => (1.0, ""),
        _ => return format!("{value:.1e}"),
    };
    let text = format!("{:.3}", value * scale);
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(steps: u64) -> (Vec<u64>, Vec<f64>) {
        (1..=steps).map(|step| (step * 512, 4.0 / step as f64)).unzip()
    }

    #[test]
    fn a_curve_has_axes_and_one_line_or_two_with_a_legend() {
        let (tokens, values) = run(10);
        let svg = curve("nats", &tokens, &values).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for part in ["tokens", "nats", "5k"] {
            assert!(svg.contains(part), "no {part} in {svg}");
        }
        assert!(!svg.contains("each step"));
        let (tokens, values) = run(500);
        let svg = curve("nats", &tokens, &values).unwrap();
        assert!(svg.contains("each step") && svg.contains("mean of 20 steps"), "{svg}");
    }

    #[test]
    fn there_is_not_always_a_curve() {
        assert!(curve("", &[], &[]).is_none());
        assert!(curve("", &[1], &[1.0]).is_none());
        assert!(curve("", &[1, 2], &[0.0, 0.0]).is_none());
        assert!(curve("", &[1, 2], &[0.0, f64::NAN]).is_none());
    }

    #[test]
    fn long_runs_are_thinned() {
        let (tokens, values) = run(10_000);
        let thin = thinned(&tokens, &values);
        assert!(thin.len() <= POINTS && thin.len() > POINTS / 2);
        assert!(curve("", &tokens, &values).unwrap().len() < 60_000);
        assert_eq!(means(&[1.0, 3.0, 5.0], 2), [1.0, 2.0, 4.0]);
    }

    #[test]
    fn amounts_are_short() {
        let cases =
            [(0.0, "0"), (6e-4, "6.0e-4"), (0.25, "0.25"), (2.5, "2.5"), (2000.0, "2k"), (1.5e6, "1.5M")];
        for (value, text) in cases {
            assert_eq!(amount(value), text);
        }
    }
}
