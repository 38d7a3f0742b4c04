//! Flags of everything that trains beside a teacher or a base.

use std::path::PathBuf;

use clap::Args;
use edgec::pipeline::Data;
use edgec::train::{Accelerator, TrainConfig};

#[derive(Args)]
pub struct Training {
    /// Text to learn from, .txt or .jsonl; may be given again [default: text inside this program]
    #[arg(long)]
    pub data: Vec<PathBuf>,
    /// Text to judge on [default: the end of the data is held out]
    #[arg(long)]
    pub eval_data: Option<PathBuf>,
    /// Learn completions and the assistant's turns only
    #[arg(long)]
    pub mask_prompts: bool,
    /// Tokens to train on
    #[arg(long, default_value_t = TrainConfig::default().tokens)]
    tokens: u64,
    /// Sequences in a forward pass
    #[arg(long, default_value_t = TrainConfig::default().batch)]
    batch: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = TrainConfig::default().length)]
    length: usize,
    /// Forward passes in an optimizer step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where the large matrix products are computed: cpu, cuda or metal; cuda:1 is the second GPU. A GPU needs a
    /// build with that feature
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: Accelerator,
    /// Steps between checkpoints; every two minutes there is one anyway
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    pub checkpoint_every: Option<u64>,
}

impl Training {
    /// The text to learn from.
    pub fn text(&self) -> Data {
        if self.data.is_empty() { Data::Embedded } else { Data::Files(self.data.clone()) }
    }

    /// The settings that these flags are, beside defaults.
    pub fn config(&self) -> TrainConfig {
        TrainConfig {
            tokens: self.tokens,
            batch: self.batch,
            length: self.length,
            accumulate: self.accumulate,
            seed: self.seed,
            ..TrainConfig::default()
        }
    }
}
