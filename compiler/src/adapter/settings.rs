//! What an adapter changes, and with which rank and scale: PEFT's choices and rules.

use std::str::FromStr;

use edge_models::{DecoderSpec, NameBuf, Role, TensorRow};
use regex::Regex;
use serde::{Deserialize, Serialize};

use super::AdapterError;

/// Matrices that adapters change.
const LINEAR: [Role; 7] =
    [Role::AttnQ, Role::AttnK, Role::AttnV, Role::AttnOut, Role::FfnGate, Role::FfnUp, Role::FfnDown];

/// Ranks, scales and the kind of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Rank of the update.
    pub rank: usize,
    /// The update is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Other ranks, by the end of a module's name; the first that fits counts.
    pub ranks: Vec<(String, usize)>,
    /// The same for alpha.
    pub alphas: Vec<(String, f64)>,
    /// rsLoRA: `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv 2312.03732).
    pub rs: bool,
    /// DoRA: the lengths of rows are trained too (Liu et al. 2024, arXiv 2402.09353).
    pub dora: bool,
}

impl Settings {
    /// The rank of a module's update, and what it is multiplied by.
    pub fn rank_and_scale(&self, module: &str) -> (usize, f32) {
        let rank = find(&self.ranks, module).unwrap_or(self.rank);
        let alpha = find(&self.alphas, module).unwrap_or(self.alpha);
        (rank, (alpha / divisor(rank, self.rs)) as f32)
    }
}

/// What alpha is divided by.
pub(super) fn divisor(rank: usize, rs: bool) -> f64 {
    if rs { (rank as f64).sqrt() } else { rank as f64 }
}

fn find<T: Copy>(patterns: &[(String, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(name, _)| ends_in(module, name)).map(|(_, value)| *value)
}

/// `name` is the module's, or its last parts.
fn ends_in(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The name of a module as PEFT has it.
pub(crate) fn module(row: &TensorRow, layer: usize) -> String {
    NameBuf::new(row.hf, layer).as_str().trim_end_matches(".weight").to_owned()
}

/// Every matrix that an adapter can change, layer by layer.
pub(crate) fn linear(spec: &DecoderSpec) -> impl Iterator<Item = (&'static TensorRow, usize)> {
    let rows = spec.family.tensors;
    (0..spec.layers).flat_map(move |layer| {
        let rows = rows.iter().filter(|row| row.leads() && LINEAR.contains(&row.role));
        rows.map(move |row| (row, layer))
    })
}

/// Which modules are adapted: `all-linear`, names between commas, or a regular expression for the whole name.
#[derive(Clone, Debug)]
pub enum Targets {
    /// All linear layers but for the head.
    AllLinear,
    /// Ends of modules' names.
    Names(Vec<String>),
    /// An expression for names of modules.
    Pattern(Regex),
}

impl FromStr for Targets {
    type Err = AdapterError;

    fn from_str(text: &str) -> Result<Self, AdapterError> {
        if text == "all-linear" {
            return Ok(Self::AllLinear);
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | ',');
        // A dot alone makes no expression: names have them too.
        if !text.is_empty() && text.chars().all(plain) {
            return Ok(Self::Names(text.split(',').map(str::to_owned).collect()));
        }
        match Regex::new(&format!("^(?:{text})$")) {
            Ok(pattern) if !text.is_empty() => Ok(Self::Pattern(pattern)),
            Ok(_) => Err(AdapterError::Targets { targets: text.into(), message: "it is empty".into() }),
            Err(error) => Err(AdapterError::Targets { targets: text.into(), message: error.to_string() }),
        }
    }
}

impl Targets {
    /// The matrices of a model that are meant, layer by layer.
    ///
    /// # Errors
    /// A name, or the expression, fits none.
    pub fn choose(&self, spec: &DecoderSpec) -> Result<Vec<(&'static TensorRow, usize)>, AdapterError> {
        let all: Vec<_> = linear(spec).map(|(row, layer)| (row, layer, module(row, layer))).collect();
        let refuse = |targets: &str| {
            let names = all.iter().filter(|(_, layer, _)| *layer == 0).map(|(.., name)| leaf(name));
            let message = match leaf(targets) {
                "embed_tokens" | "lm_head" => "the embedding table and the head take no adapter; there are",
                _ => "no linear layer is called so; there are",
            };
            let message = format!("{message} {}", names.collect::<Vec<_>>().join(", "));
            AdapterError::Targets { targets: targets.into(), message }
        };
        let fits = |fits: &dyn Fn(&str) -> bool| -> Vec<_> {
            all.iter().filter(|(.., name)| fits(name)).map(|(row, layer, _)| (*row, *layer)).collect()
        };
        let chosen = match self {
            Self::AllLinear => fits(&|_| true),
            Self::Names(names) => {
                let unknown = |name: &&String| !all.iter().any(|(.., module)| ends_in(module, name));
                if let Some(name) = names.iter().find(unknown) {
                    return Err(refuse(name));
                }
                fits(&|module| names.iter().any(|name| ends_in(module, name)))
            }
            Self::Pattern(pattern) => fits(&|module| pattern.is_match(module)),
        };
        match (chosen.is_empty(), self) {
            (true, Self::Pattern(pattern)) => Err(refuse(pattern.as_str())),
            (true, _) => Err(refuse("all-linear")),
            _ => Ok(chosen),
        }
    }
}

/// The last part of a module's name.
pub(super) fn leaf(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::fixture::tiny;

    fn chosen(targets: &str) -> Result<Vec<String>, String> {
        let targets: Targets = targets.parse().map_err(|error: AdapterError| error.to_string())?;
        let chosen = targets.choose(&tiny(2, 1).spec).map_err(|error| error.to_string())?;
        Ok(chosen.iter().map(|(row, layer)| module(row, *layer)).collect())
    }

    #[test]
    fn targets_are_what_peft_would_take() {
        assert_eq!(chosen("all-linear").unwrap().len(), 14);
        let names = chosen("q_proj,mlp.up_proj").unwrap();
        assert_eq!(names[..2], ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]);
        assert_eq!(names.len(), 4);
        assert_eq!(chosen("layers.1.self_attn.v_proj").unwrap(), ["model.layers.1.self_attn.v_proj"]);
        let names = chosen(r".*\.1\.self_attn\.(q|k)_proj").unwrap();
        assert_eq!(names, ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]);
    }

    #[test]
    fn what_fits_nothing_is_named() {
        for (targets, part) in [
            ("q_proj,w_proj", "`w_proj`: no linear layer"),
            ("proj", "there are q_proj, k_proj"),
            ("embed_tokens", "take no adapter"),
            ("lm_head", "take no adapter"),
            ("q_(proj", "unclosed group"),
            ("q_proj|nothing", "no linear layer"),
            ("", "empty"),
            ("q_proj,", "no linear layer"),
        ] {
            let error = chosen(targets).unwrap_err();
            assert!(error.contains(part), "{targets}: {error}");
        }
    }

    #[test]
    fn the_first_pattern_counts() {
        let settings = Settings {
            rank: 4,
            alpha: 8.0,
            ranks: vec![("layers.1.mlp.up_proj".into(), 16), ("up_proj".into(), 2)],
            alphas: vec![("q_proj".into(), 12.0)],
            rs: false,
            dora: false,
        };
        assert_eq!(settings.rank_and_scale("model.layers.1.mlp.up_proj"), (16, 0.5));
        assert_eq!(settings.rank_and_scale("model.layers.0.mlp.up_proj"), (2, 4.0));
        assert_eq!(settings.rank_and_scale("model.layers.0.self_attn.q_proj"), (4, 3.0));
        assert_eq!(
            Settings { rs: true, ..settings }.rank_and_scale("model.layers.0.mlp.down_proj"),
            (4, 4.0)
        );
    }
}
