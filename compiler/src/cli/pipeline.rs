//! `edgec pipeline`: commands one after the other, from a recipe with a section for each.
//!
//! A section holds the flags of its command, as a recipe file of `distill` does. What a stage before has made is
//! put in where the section does not say otherwise; all else is the commands'.

use std::any::TypeId;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use clap::{ArgMatches, Args, CommandFactory, Parser};
use edgec::pipeline::ledger::{Ledger, Stage, State};
use toml::de::DeValue;

use super::processes::alone;
use super::progress::note;
use super::{Cli, output, recipe};

/// The stages, in order; each is the command of that name.
const STAGES: [&str; 5] = ["synth", "tune", "distill", "quantize", "bundle"];

/// Flags that the pipeline gives itself.
const OWN: [&str; 3] = ["out", "json", "print_recipe"];

/// Runs a chain of commands, each on what the one before made.
///
/// The recipe is a TOML file with a section for each stage that is wanted, [synth], [tune], [distill], [quantize] or
/// [bundle], which holds the flags of that command. Rows of synth are the data of tune and distill; the model that was
/// tuned and its adapter are the teacher of distill; quantize takes the student, bundle what was quantized. A section
/// may say otherwise.
///
/// Each stage leaves its result in a folder of its name. Run again, the command goes on where it was; a stage whose
/// section or files have changed is done again, with all that follow.
#[derive(Args)]
pub struct Arguments {
    /// TOML file with a section for each stage
    file: PathBuf,
    /// Folder of the stages' folders [default: runs/ and the name of the file]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// A command to be run.
struct Step {
    stage: Stage,
    folder: PathBuf,
    arguments: Vec<OsString>,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    alone("edgec pipeline")?;
    let out = arguments
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(arguments.file.file_stem().unwrap_or("pipeline".as_ref())));
    let steps = plan(&arguments.file, &out)?;
    let stages: Vec<Stage> = steps.iter().map(|step| step.stage.clone()).collect();
    let mut ledger = Ledger::open(&out)?;
    let states = ledger.states(&stages);
    for (step, state) in steps.iter().zip(&states) {
        let what = match state {
            State::Done => "done before".to_owned(),
            State::Begun => format!("goes on: {}", step.line()),
            State::New => step.line(),
        };
        if arguments.dry_run || *state == State::Done {
            note(&step.stage.name, &what);
        }
    }
    if arguments.dry_run {
        return Ok(());
    }
    let gone = ledger.forget_others(&stages)?;
    if !gone.is_empty() {
        note("pipeline", &format!("asked otherwise than before, so done again: {}", gone.join(", ")));
    }
    for (step, state) in steps.iter().zip(states).filter(|(_, state)| *state != State::Done) {
        let name = &step.stage.name;
        let resumed = state == State::Begun && step.can_resume();
        if !resumed {
            ledger.clear(name)?;
        }
        if state == State::New {
            ledger.begin(&step.stage)?;
        }
        note("pipeline", &format!("{}{}", step.line(), if resumed { " --resume" } else { "" }));
        step.run(resumed).with_context(|| format!("stage {name}"))?;
        ledger.finish()?;
    }
    output::line(format!("everything is in {}: {}", out.display(), names(&steps)))?;
    Ok(())
}

fn names(steps: &[Step]) -> String {
    let names: Vec<String> = steps.iter().map(|step| format!("{}/", step.stage.name)).collect();
    names.join(", ")
}

impl Step {
    /// The command as it would be typed.
    fn line(&self) -> String {
        let words = self.arguments.iter().map(|word| {
            let word = word.to_string_lossy();
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,%+@".contains(c);
            if word.chars().all(plain) { word.into_owned() } else { format!("{word:?}") }
        });
        words.collect::<Vec<_>>().join(" ")
    }

    /// Whether there is something in the folder that the command can take up.
    fn can_resume(&self) -> bool {
        let mark = match self.stage.name.as_str() {
            "synth" => ROWS,
            "tune" | "distill" => "recipe.json",
            // Over in minutes, and whole or not there.
            _ => return false,
        };
        self.folder.join(mark).exists()
    }

    fn run(&self, resume: bool) -> anyhow::Result<()> {
        if ["synth", "quantize"].contains(&self.stage.name.as_str()) {
            std::fs::create_dir_all(&self.folder).with_context(|| self.folder.display().to_string())?;
        }
        let resume = resume.then(|| "--resume".into());
        let Cli { command } = Cli::try_parse_from(self.arguments.iter().cloned().chain(resume))?;
        super::execute(command)
    }
}

/// What `synth` writes.
const ROWS: &str = "rows.jsonl";
/// What `quantize` writes.
const QUANTIZED: &str = "student.gguf";

/// What the stages before have made, and were asked.
#[derive(Default)]
struct Made {
    rows: Option<PathBuf>,
    tuned: Option<(Option<PathBuf>, PathBuf)>,
    student: Option<PathBuf>,
    shipped: Option<PathBuf>,
    target: Option<String>,
}

/// The commands that a recipe asks for. All of them are checked before the first one runs.
fn plan(path: &Path, out: &Path) -> anyhow::Result<Vec<Step>> {
    let said = |message: String| anyhow!(message);
    let text = recipe::read(path).map_err(said)?;
    let table = recipe::table(&text, path).map_err(said)?;
    for (key, value) in table.get_ref() {
        let (name, place) = (key.get_ref(), recipe::place(path, &text, &key.span()));
        if !STAGES.contains(&name.as_ref()) {
            bail!("{place}: `{name}` is no stage, expected {}", STAGES.join(", "));
        }
        if !matches!(value.get_ref(), DeValue::Table(_)) {
            bail!("{place}: `{name}` is a {}, expected a section", value.get_ref().type_str());
        }
    }
    let mut command = Cli::command();
    command.build();
    let mut made = Made::default();
    let mut steps: Vec<Step> = Vec::new();
    for name in STAGES {
        let Some(DeValue::Table(keys)) = table.get_ref().get(name).map(|value| value.get_ref()) else {
            continue;
        };
        let sub = command.find_subcommand(name).with_context(|| format!("no command {name}"))?;
        let inside = |arg: &clap::Arg| recipe::inside(arg) && !OWN.contains(&arg.get_id().as_str());
        let flags = recipe::section(sub, keys, &text, path, inside, |_| false).map_err(said)?;
        let folder = out.join(name);
        let own = made.own(name, &folder, &|key| keys.contains_key(key));
        let arguments = [vec!["edgec".into(), name.into()], flags, own].concat();
        let matches = command.clone().try_get_matches_from(&arguments).map_err(|error| {
            let said = error.render().to_string();
            let said = said.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            anyhow!("{}: [{name}]: {said}", path.display())
        })?;
        let given = matches.subcommand_matches(name).with_context(|| format!("no command {name}"))?;
        made.add(name, &folder, given);
        let inputs: Vec<PathBuf> = sub
            .get_arguments()
            .filter(|arg| arg.get_value_parser().type_id() == TypeId::of::<PathBuf>())
            .filter_map(|arg| given.get_raw(arg.get_id().as_str()))
            .flatten()
            .map(PathBuf::from)
            // What a stage before has made is in that stage's key.
            .filter(|input| !input.starts_with(out))
            .collect();
        let stage = Stage::new(name, &arguments, &inputs, steps.last().map(|step| &step.stage))?;
        steps.push(Step { stage, folder, arguments });
    }
    if steps.is_empty() {
        bail!("{}: no stage, expected a section for one of {}", path.display(), STAGES.join(", "));
    }
    Ok(steps)
}

impl Made {
    /// What a stage is given of what there is, unless its section `says` so itself.
    fn own(&self, name: &str, folder: &Path, says: &dyn Fn(&str) -> bool) -> Vec<OsString> {
        let mut flags = Vec::new();
        let mut flag = |flag: &str, value: Option<&Path>| {
            if let Some(value) = value.filter(|_| !says(flag)) {
                flags.extend([format!("--{flag}").into(), value.into()]);
            }
        };
        match name {
            "synth" => flag("out", Some(&folder.join(ROWS))),
            "quantize" => flag("out", Some(&folder.join(QUANTIZED))),
            _ => flag("out", Some(folder)),
        }
        if ["tune", "distill"].contains(&name) {
            flag("data", self.rows.as_deref());
        }
        if let ("distill", Some((model, adapter))) = (name, &self.tuned)
            && !says("teacher")
        {
            flag("teacher", model.as_deref());
            flag("teacher-adapter", Some(adapter));
            // Rows of a server may have its probabilities; here the tuned model is to be learned from.
            flag("soft-targets", Some("teacher".as_ref()));
        }
        if name == "bundle" {
            flag("target", self.target.as_ref().map(Path::new));
        }
        let model = match name {
            "quantize" => self.student.as_ref(),
            "bundle" => self.shipped.as_ref(),
            _ => None,
        };
        flags.extend(model.filter(|_| !says("model")).map(Into::into));
        flags
    }

    fn add(&mut self, name: &str, folder: &Path, given: &ArgMatches) {
        match name {
            "synth" => self.rows = Some(folder.join(ROWS)),
            "tune" => self.tuned = Some((given.get_one::<PathBuf>("model").cloned(), folder.into())),
            "distill" => {
                self.student = Some(folder.join("student"));
                self.shipped = Some(folder.join("student.gguf"));
                self.target = given.get_one::<String>("target").cloned();
            }
            "quantize" => self.shipped = Some(folder.join(QUANTIZED)),
            _ => {}
        }
    }
}
