//! `edgec targets`.

use clap::Args;
use edge_targets::Target;
use serde_json::{Value, json};

use super::output;

#[derive(Args)]
pub struct Arguments {
    /// Name of a target; without it all are listed
    name: Option<String>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    match &arguments.name {
        Some(name) => one(&Target::by_name(name)?, arguments.json),
        None => all(arguments.json),
    }
}

fn all(json: bool) -> anyhow::Result<()> {
    let targets = Target::all()?;
    if json {
        return output::json(&targets.iter().map(document).collect::<Vec<_>>());
    }
    let header = ["name", "triple", "cores", "RAM", "GB/s", "evidence"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for target in &targets {
        rows.push(vec![
            target.name.clone(),
            target.triple.clone(),
            cores(target),
            output::bytes(u64::from(target.ram_mib) << 20),
            format!("{:.0}", target.bandwidth_gbs),
            target.evidence.tier.to_string(),
        ]);
    }
    Ok(output::line(output::table(&rows))?)
}

fn one(target: &Target, json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(&document(target));
    }
    let isa: Vec<_> = target.isa.iter().map(ToString::to_string).collect();
    let mut lines = vec![
        format!("{}: {}", target.name, target.description),
        format!("  triple      {} ({}, {})", target.triple, target.os, target.abi),
        format!("  cores       {}", cores(target)),
        format!("  threads     {} for a model", target.threads()),
        format!("  features    {}", if isa.is_empty() { "baseline".into() } else { isa.join(" ") }),
        format!(
            "  memory      {}, {} GB/s",
            output::bytes(u64::from(target.ram_mib) << 20),
            target.bandwidth_gbs
        ),
        format!("  evidence    {}: {}", target.evidence.tier, target.evidence.source),
    ];
    if !target.evidence.unverified.is_empty() {
        lines.push(format!("  unverified  {}", target.evidence.unverified.join(", ")));
    }
    if !target.aliases.is_empty() {
        lines.push(format!("  also called {}", target.aliases.join(", ")));
    }
    Ok(output::line(lines.join("\n"))?)
}

fn cores(target: &Target) -> String {
    let clusters: Vec<_> =
        target.clusters.iter().map(|cluster| format!("{}x {}", cluster.count, cluster.core)).collect();
    clusters.join(" + ")
}

fn document(target: &Target) -> Value {
    json!({
        "name": target.name,
        "aliases": target.aliases,
        "description": target.description,
        "triple": target.triple,
        "os": target.os.as_str(),
        "abi": target.abi,
        "isa": target.isa.iter().map(|isa| isa.as_str()).collect::<Vec<_>>(),
        "clusters": target.clusters.iter().map(|cluster| json!({
            "core": cluster.core, "count": cluster.count, "ghz": cluster.ghz,
        })).collect::<Vec<_>>(),
        "threads": target.threads(),
        "ram_mib": target.ram_mib,
        "bandwidth_gbs": target.bandwidth_gbs,
        "evidence": {
            "tier": target.evidence.tier.as_str(),
            "source": target.evidence.source,
            "unverified": target.evidence.unverified,
        },
    })
}
