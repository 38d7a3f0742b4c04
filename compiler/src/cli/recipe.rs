//! A recipe file: the flags of a command as TOML, so that a run can be written down and given again.
//!
//! Keys are the long names of flags, whatever flags there are; values are checked where those of flags are.
//! Flags on the command line win. What is no flag is refused with its line.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, Parser};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Longest recipe that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Flags that say how a recipe is used and are no part of one.
const OUTSIDE: [&str; 5] = ["recipe", "print_recipe", "resume", "help", "version"];

/// Parses a command line with the recipe that it names, if it names one.
///
/// # Errors
/// What makes no sense, in the command line or in the recipe.
pub fn parse<C: Parser + CommandFactory>(arguments: Vec<OsString>) -> Result<C, clap::Error> {
    match expand::<C>(&arguments)? {
        None => C::try_parse_from(arguments),
        // The command line alone made sense: what does not now is the recipe's.
        Some((path, expanded)) => C::try_parse_from(expanded).map_err(|error| {
            let said = error.render().to_string();
            let said = said.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
            C::command().error(error.kind(), format!("{}: {said}", path.display()))
        }),
    }
}

/// The command line with the flags of the recipe that it names, and that recipe; `None` if it names none.
fn expand<C: CommandFactory>(
    arguments: &[OsString],
) -> Result<Option<(PathBuf, Vec<OsString>)>, clap::Error> {
    let mut command = C::command();
    command.build();
    let matches = command.clone().try_get_matches_from(arguments)?;
    let Some((name, given)) = matches.subcommand() else { return Ok(None) };
    let Ok(Some(path)) = given.try_get_one::<PathBuf>("recipe") else { return Ok(None) };
    let Some(command) = command.find_subcommand_mut(name) else { return Ok(None) };
    match flags(command, given, path) {
        Ok(flags) => Ok(Some((path.clone(), [arguments, &flags].concat()))),
        Err(message) => Err(command.error(ErrorKind::ValueValidation, message)),
    }
}

/// The flags that a recipe stands for, without those that the command line decides.
fn flags(command: &Command, given: &ArgMatches, path: &Path) -> Result<Vec<OsString>, String> {
    let text = read(path)?;
    let table = table(&text, path)?;
    let on_line = |arg: &Arg| given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    let decided = |arg: &Arg| {
        on_line(arg)
            || command.get_arg_conflicts_with(arg).into_iter().any(on_line)
            || command.get_arguments().filter(|other| on_line(other)).any(|other| {
                command.get_arg_conflicts_with(other).iter().any(|conflict| conflict.get_id() == arg.get_id())
            })
    };
    section(command, table.get_ref(), &text, path, inside, decided)
}

/// The text of a recipe.
pub fn read(path: &Path) -> Result<String, String> {
    let refuse = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let length = std::fs::metadata(path).map_err(|error| refuse(&error))?.len();
    if length > MAX_BYTES {
        return Err(refuse(&format!("{length} bytes, expected at most {MAX_BYTES} for a recipe")));
    }
    std::fs::read_to_string(path).map_err(|error| refuse(&error))
}

/// What a recipe's text says.
pub fn table<'t>(text: &'t str, path: &Path) -> Result<Spanned<DeTable<'t>>, String> {
    DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line(text, &span));
        format!("{}:{line}: {}", path.display(), error.message())
    })
}

/// The flags that the keys of a table stand for: those of `command` that are `inside`, without what was `decided`
/// elsewhere. An argument without a flag has its name as key.
pub fn section(
    command: &Command,
    table: &DeTable<'_>,
    text: &str,
    path: &Path,
    inside: impl Fn(&Arg) -> bool,
    decided: impl Fn(&Arg) -> bool,
) -> Result<Vec<OsString>, String> {
    let mut flags = Vec::new();
    for (key, value) in table {
        let name = key.get_ref().as_ref();
        let place = place(path, text, &key.span());
        let Some(arg) = command.get_arguments().find(|arg| key_of(arg) == name && inside(arg)) else {
            return Err(format!("{place}: `{name}` is no flag of `{}`", command.get_name()));
        };
        let values = values(value.get_ref(), &text[value.span()]).ok_or_else(|| {
            format!(
                "{place}: `{name}` is a {}, expected a value or a list of values",
                value.get_ref().type_str()
            )
        })?;
        if decided(arg) {
            continue;
        }
        match arg.get_action() {
            ArgAction::SetTrue => match values[..] {
                [ref value] if value == "true" => flags.push(format!("--{name}").into()),
                [ref value] if value == "false" => {}
                _ => {
                    return Err(format!(
                        "{place}: `{name}` is {}, expected true or false",
                        &text[value.span()]
                    ));
                }
            },
            _ if arg.is_positional() => flags.extend(values.iter().map(Into::into)),
            ArgAction::Append => flags.extend(values.iter().map(|value| format!("--{name}={value}").into())),
            _ => flags.push(format!("--{name}={}", values.join(",")).into()),
        }
    }
    Ok(flags)
}

/// What a flag is called in a recipe: its long name; an argument without one its own.
pub fn key_of(arg: &Arg) -> &str {
    arg.get_long().unwrap_or(arg.get_id().as_str())
}

/// Where in a recipe something is.
pub fn place(path: &Path, text: &str, span: &Range<usize>) -> String {
    format!("{}:{}", path.display(), line(text, span))
}

/// Whether a flag can stand in a recipe.
pub fn inside(arg: &Arg) -> bool {
    !OUTSIDE.contains(&arg.get_id().as_str())
}

/// A value as it would stand on the command line, or several of a list.
fn values(value: &DeValue<'_>, text: &str) -> Option<Vec<String>> {
    Some(match value {
        DeValue::String(text) => vec![text.to_string()],
        DeValue::Integer(_) | DeValue::Float(_) => vec![text.replace('_', "")],
        DeValue::Boolean(value) => vec![value.to_string()],
        DeValue::Array(list) => {
            let one = |value: &DeValue<'_>| match value {
                DeValue::String(text) => Some(text.to_string()),
                DeValue::Integer(number) => Some(number.as_str().to_owned()),
                DeValue::Float(number) => Some(number.as_str().to_owned()),
                _ => None,
            };
            list.iter().map(|value| one(value.get_ref())).collect::<Option<_>>()?
        }
        DeValue::Datetime(_) | DeValue::Table(_) => return None,
    })
}

/// The line of the beginning of `span`, counted from 1.
fn line(text: &str, span: &Range<usize>) -> usize {
    1 + text.as_bytes()[..span.start.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// The recipe of what was asked: every flag of `command` with a value, defaults included.
///
/// # Errors
/// A path that is no text.
pub fn print<C: Parser + CommandFactory>(
    arguments: Vec<OsString>,
    subcommand: &str,
) -> anyhow::Result<String> {
    let mut command = C::command();
    command.build();
    let arguments = expand::<C>(&arguments)?.map_or(arguments, |(_, expanded)| expanded);
    let matches = command.clone().try_get_matches_from(arguments)?;
    let (Some((name, given)), Some(command)) = (matches.subcommand(), command.find_subcommand(subcommand))
    else {
        anyhow::bail!("no command `{subcommand}`");
    };
    let mut text = format!("# edgec {name} --recipe FILE\n");
    for arg in command.get_arguments().filter(|arg| inside(arg)) {
        let (id, Some(long)) = (arg.get_id().as_str(), arg.get_long()) else { continue };
        let Some(values) = given.get_raw(id) else {
            if matches!(arg.get_action(), ArgAction::SetTrue) && given.get_flag(id) {
                writeln!(text, "{long} = true")?;
            }
            continue;
        };
        let values: Option<Vec<&str>> = values.map(|value| value.to_str()).collect();
        let Some(values) = values else { anyhow::bail!("--{long} is no text and cannot stand in a recipe") };
        let written: Vec<String> = values.iter().map(|value| literal(value)).collect();
        match arg.get_action() {
            ArgAction::SetTrue => writeln!(text, "{long} = {}", given.get_flag(id))?,
            ArgAction::Append => writeln!(text, "{long} = [{}]", written.join(", "))?,
            _ if written.len() == 1 => writeln!(text, "{long} = {}", written[0])?,
            _ => writeln!(text, "{long} = [{}]", written.join(", "))?,
        }
    }
    Ok(text)
}

/// A number as it is, anything else as a TOML string.
fn literal(value: &str) -> String {
    let number = value.parse::<i64>().is_ok() || (value.contains('.') && value.parse::<f64>().is_ok());
    let digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
    let bytes = value.as_bytes();
    // TOML wants a digit on both sides of a point and no zero in front.
    if number
        && digit(bytes.first())
        && digit(bytes.last())
        && (bytes[0] != b'0' || value.starts_with("0.") || value == "0")
    {
        value.to_owned()
    } else {
        toml::Value::String(value.to_owned()).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[derive(Parser, Debug)]
    struct Tool {
        #[command(subcommand)]
        command: Sub,
    }

    #[derive(clap::Subcommand, Debug)]
    enum Sub {
        Go(Go),
    }

    #[derive(clap::Args, Debug)]
    struct Go {
        #[arg(long, default_value_t = 5)]
        tokens: u64,
        #[arg(long, default_value_t = 0.5)]
        beta: f64,
        #[arg(long)]
        data: Vec<PathBuf>,
        #[arg(long)]
        mask_prompts: bool,
        #[arg(long, conflicts_with = "share")]
        layers: Option<usize>,
        #[arg(long)]
        share: Option<f64>,
        #[arg(long, value_delimiter = ',')]
        numbers: Vec<usize>,
        #[arg(long, default_value = "fkl")]
        loss: String,
        #[arg(long)]
        recipe: Option<PathBuf>,
    }

    fn with(recipe: &str, flags: &[&str]) -> Result<Go, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.toml");
        fs::write(&path, recipe).unwrap();
        let mut arguments: Vec<OsString> = vec!["tool".into(), "go".into(), "--recipe".into(), path.into()];
        arguments.extend(flags.iter().map(Into::into));
        let Tool { command: Sub::Go(go) } =
            parse(arguments).map_err(|error: clap::Error| error.to_string())?;
        Ok(go)
    }

    #[test]
    fn keys_are_flags_and_flags_win() {
        let recipe = "tokens = 1_000\nbeta = 0.25\ndata = [\"a b.txt\", \"c.txt\"]\nmask-prompts = true\n\
                      layers = 3\nnumbers = [1, 2]\n# a comment\nloss = \"fkl=0.5,tvd=0.5\"\n";
        let go = with(recipe, &[]).unwrap();
        assert_eq!((go.tokens, go.beta, go.mask_prompts, go.layers), (1000, 0.25, true, Some(3)));
        assert_eq!(
            (go.data.len(), &go.data[0], &go.numbers[..]),
            (2, &PathBuf::from("a b.txt"), &[1, 2][..])
        );
        assert_eq!(go.loss, "fkl=0.5,tvd=0.5");
        let go = with(recipe, &["--tokens", "7", "--share", "0.5", "--data", "d.txt"]).unwrap();
        assert_eq!((go.tokens, go.layers, go.share), (7, None, Some(0.5)));
        assert_eq!(go.data, [PathBuf::from("d.txt")]);
    }

    #[test]
    fn what_is_no_flag_is_refused_with_its_line() {
        for (recipe, said) in [
            ("tokens = 1\n\nbata = 1\n", "r.toml:3: `bata` is no flag of `go`"),
            ("recipe = \"x\"\n", "r.toml:1: `recipe` is no flag"),
            ("tokens = 1\ntokens = 2\n", "r.toml:2: "),
            ("tokens = \n", "r.toml:1: "),
            ("[tokens]\na = 1\n", "r.toml:1: `tokens` is a table"),
            ("mask-prompts = 3\n", "r.toml:1: `mask-prompts` is 3, expected true or false"),
            ("tokens = \"many\"\n", "r.toml: invalid value 'many' for '--tokens"),
        ] {
            let error = with(recipe, &[]).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        let missing = parse::<Tool>(["tool", "go", "--recipe", "/no/such.toml"].map(OsString::from).to_vec());
        assert!(missing.unwrap_err().to_string().contains("/no/such.toml"));
    }

    #[test]
    fn what_is_printed_is_read_again() {
        let flags =
            ["tool", "go", "--beta", ".25", "--data", "a\"b.txt", "--mask-prompts", "--numbers", "4,5"];
        let text = print::<Tool>(flags.map(OsString::from).to_vec(), "go").unwrap();
        assert!(text.contains("tokens = 5\n") && !text.contains("layers"), "{text}");
        let go = with(&text, &[]).unwrap();
        assert_eq!((go.tokens, go.beta, go.mask_prompts, &go.numbers[..]), (5, 0.25, true, &[4, 5][..]));
        assert_eq!(go.data, [PathBuf::from("a\"b.txt")]);
    }
}
