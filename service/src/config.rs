//! Layered configuration: defaults < TOML file < `HEADSTART_*` environment < flags.
//!
//! A binary describes its options once, as a clap struct with `env` on each and a `--config` option
//! (flatten [`CommonOptions`]). A key of the file is an option's long name, with `-` or `_`; its
//! value becomes the option's default, so that environment and flags stay on top, and is checked by
//! the option's own parser. What is wrong exits with code 2 and names the file and the field.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::Resettable;
use clap::{Arg, ArgAction, Args, Command, Parser};

use crate::telemetry::LogFormat;

/// Largest configuration file, in bytes.
const FILE_BYTES_MAX: usize = 1 << 20;

/// Exit code for a configuration that cannot be used.
const USAGE_EXIT_CODE: i32 = 2;

/// The options that every binary has.
#[derive(Clone, Debug, Args)]
pub struct CommonOptions {
    /// A TOML file with any of these options; environment and flags win over it
    #[arg(long, env = "HEADSTART_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How log lines on stderr look; RUST_LOG says which (default: info)
    #[arg(long, env = "HEADSTART_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// A configuration cannot be used.
#[derive(Debug)]
pub enum ConfigError {
    /// A flag or an environment variable is wrong, or help was asked for.
    Usage(clap::Error),
    /// The file, or one of its fields, is wrong.
    File {
        /// The file.
        path: PathBuf,
        /// The line where it is known, from 1.
        line: Option<usize>,
        /// The key where one is at fault.
        field: Option<String>,
        /// What was expected and what was found.
        message: String,
    },
    /// A value is wrong in a way that only shows together with others.
    Invalid {
        /// The long option.
        field: &'static str,
        /// What was expected and what was found.
        message: String,
    },
}

impl ConfigError {
    /// Prints the error, or the help that was asked for, and ends the process.
    pub fn exit(&self) -> ! {
        match self {
            Self::Usage(error) => error.exit(),
            _ => {
                eprintln!("error: {self}");
                std::process::exit(USAGE_EXIT_CODE)
            }
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(error) => f.write_str(&first_paragraph(error)),
            Self::File { path, line, field, message } => {
                write!(f, "{}", path.display())?;
                if let Some(line) = line {
                    write!(f, ":{line}")?;
                }
                if let Some(field) = field {
                    write!(f, ": {field}")?;
                }
                write!(f, ": {message}")
            }
            Self::Invalid { field, message } => write!(f, "--{field}: {message}"),
        }
    }
}

impl std::error::Error for ConfigError {}

/// Reads the configuration of this process; a wrong one ends it with code 2.
pub fn parse<C: Parser>() -> C {
    parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Reads a configuration from `args` (the program's name first), the environment and the file that
/// `--config` names.
///
/// # Errors
/// [`ConfigError`] names the file and the field.
pub fn parse_from<C: Parser>(
    args: impl IntoIterator<Item = impl Into<OsString>>,
) -> Result<C, ConfigError> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let mut command = C::command();
    if let Some(path) = config_path(&command, &args) {
        command = layer(&command, &path)?;
    }
    let mut matches = command.try_get_matches_from_mut(&args).map_err(ConfigError::Usage)?;
    C::from_arg_matches_mut(&mut matches)
        .map_err(|error| ConfigError::Usage(error.format(&mut command)))
}

/// Parses a duration: seconds, or a number with `ms`, `s` or `m`. For `value_parser`.
///
/// # Errors
/// A message that says what was expected.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit_ms) = match text {
        _ if text.ends_with("ms") => (&text[..text.len() - 2], 1.0),
        _ if text.ends_with('s') => (&text[..text.len() - 1], 1e3),
        _ if text.ends_with('m') => (&text[..text.len() - 1], 60e3),
        _ => (text, 1e3),
    };
    match number.parse::<f64>() {
        Ok(number) if number > 0.0 && number * unit_ms <= 86_400e3 => {
            Ok(Duration::from_secs_f64(number * unit_ms / 1e3))
        }
        _ => {
            Err("expected a duration above 0 and up to a day, such as 30, 1.5s, 500ms or 2m".into())
        }
    }
}

/// The file that `--config` or its environment variable names. A command line that cannot be read
/// names none: it is refused later, with its own message.
fn config_path(command: &Command, args: &[OsString]) -> Option<PathBuf> {
    let lenient = command.clone().mut_args(|arg| arg.required(false));
    let matches = lenient.try_get_matches_from(args).ok()?;
    matches.try_get_one::<PathBuf>("config").ok().flatten().cloned()
}

/// Makes the file's values the defaults of `command`.
fn layer(command: &Command, path: &Path) -> Result<Command, ConfigError> {
    let mut layered = command.clone();
    for (key, value) in read(path)? {
        let fail = |message: String| ConfigError::File {
            path: path.to_owned(),
            line: None,
            field: Some(key.clone()),
            message,
        };
        let arg = find(command, &key).ok_or_else(|| fail(unknown_key(command)))?;
        let texts = texts(arg, &value).map_err(fail)?;
        check(command, arg, &texts).map_err(fail)?;
        layered =
            layered.mut_arg(arg.get_id().clone(), |arg| arg.required(false).default_values(texts));
    }
    Ok(layered)
}

fn read(path: &Path) -> Result<toml::Table, ConfigError> {
    let fail = |line: Option<usize>, message: String| ConfigError::File {
        path: path.to_owned(),
        line,
        field: None,
        message,
    };
    let bytes = std::fs::read(path).map_err(|error| fail(None, error.to_string()))?;
    if bytes.len() > FILE_BYTES_MAX {
        return Err(fail(None, format!("expected at most 1 MiB, found {} bytes", bytes.len())));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| fail(None, "expected UTF-8 text, found something else".into()))?;
    text.parse::<toml::Table>().map_err(|error| {
        let line = error
            .span()
            .and_then(|span| text.get(..span.start))
            .map(|before| before.matches('\n').count() + 1);
        fail(line, error.message().to_owned())
    })
}

/// The option that a key of the file means.
fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let long = key.replace('_', "-");
    command.get_arguments().find(|arg| settable(arg) == Some(long.as_str()))
}

/// The long name of an option that a file may set.
fn settable(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|long| !matches!(*long, "config" | "help" | "version"))
}

fn unknown_key(command: &Command) -> String {
    let known: Vec<&str> = command.get_arguments().filter_map(settable).collect();
    format!("unknown key, expected one of {}", known.join(", "))
}

/// A TOML value as the texts that the option's parser reads.
fn texts(arg: &Arg, value: &toml::Value) -> Result<Vec<String>, String> {
    let switch = matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse);
    let several = matches!(arg.get_action(), ArgAction::Append)
        || arg.get_value_delimiter().is_some()
        || arg.get_num_args().is_some_and(|count| count.max_values() > 1);
    match value {
        toml::Value::Boolean(on) => Ok(vec![on.to_string()]),
        _ if switch => Err(format!("expected true or false, found {}", kind(value))),
        toml::Value::Array(values) if several => values.iter().map(scalar).collect(),
        _ => Ok(vec![scalar(value)?]),
    }
}

fn scalar(value: &toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        _ => Err(format!("expected one text or number, found {}", kind(value))),
    }
}

fn kind(value: &toml::Value) -> &'static str {
    match value {
        toml::Value::String(_) => "a text",
        toml::Value::Integer(_) | toml::Value::Float(_) => "a number",
        toml::Value::Boolean(_) => "a boolean",
        toml::Value::Datetime(_) => "a date",
        toml::Value::Array(_) => "an array",
        toml::Value::Table(_) => "a table",
    }
}

/// Runs the option's own parser on `texts`, with nothing else on the command line.
fn check(command: &Command, arg: &Arg, texts: &[String]) -> Result<(), String> {
    let Some(long) = arg.get_long() else { return Ok(()) };
    if matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse) {
        return Ok(());
    }
    let alone = command.clone().mut_args(|arg| arg.required(false).env(Resettable::Reset));
    let args = texts.iter().map(|text| format!("--{long}={text}"));
    let args: Vec<String> = std::iter::once("file".to_owned()).chain(args).collect();
    match alone.try_get_matches_from(args) {
        Ok(_) => Ok(()),
        Err(error) => Err(first_paragraph(&error)),
    }
}

/// What clap says, without usage and hints, on one line.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Options {
        #[command(flatten)]
        common: CommonOptions,
        /// Required
        #[arg(long)]
        model: String,
        #[arg(long, env = "HEADSTART_TEST_SLOTS", default_value_t = 4)]
        slots: u32,
        #[arg(long, value_delimiter = ',')]
        etcd: Vec<String>,
        #[arg(long, value_parser = duration, default_value = "10s")]
        drain_timeout: Duration,
        #[arg(long)]
        eager: bool,
    }

    fn file(text: impl AsRef<[u8]>) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        file
    }

    fn with(text: impl AsRef<[u8]>, flags: &[&str]) -> Result<Options, ConfigError> {
        let file = file(text);
        let config = format!("--config={}", file.path().display());
        let args =
            ["x".to_owned(), config].into_iter().chain(flags.iter().map(|f| (*f).to_owned()));
        parse_from(args)
    }

    #[test]
    fn a_file_fills_in_what_flags_leave_open() {
        let text = "model = 'm'\nslots = 7\netcd = ['a:1', 'b:2']\ndrain_timeout = 2.5\neager = true\nlog-format = 'json'";
        let options = with(text, &[]).unwrap();
        assert_eq!((options.model.as_str(), options.slots), ("m", 7));
        assert_eq!(options.etcd, ["a:1", "b:2"]);
        assert_eq!(options.drain_timeout, Duration::from_millis(2500));
        assert!(options.eager);
        assert_eq!(options.common.log_format, LogFormat::Json);
        let options = with(text, &["--slots=9", "--model", "n", "--etcd", "c:3,d:4"]).unwrap();
        assert_eq!((options.model.as_str(), options.slots), ("n", 9));
        assert_eq!(options.etcd, ["c:3", "d:4"]);
        assert_eq!(with("model = 'm'", &[]).unwrap().slots, 4);
        let joined = with("model = 'm'\netcd = 'a:1,b:2'", &[]).unwrap();
        assert_eq!(joined.etcd, ["a:1", "b:2"]);
    }

    /// The environment belongs to the whole process, so the test runs itself again in another one.
    #[test]
    fn the_environment_wins_over_the_file_and_flags_over_both() {
        if std::env::var_os("HEADSTART_TEST_SLOTS").is_some() {
            let text = "model = 'm'\nslots = 7";
            assert_eq!(with(text, &[]).unwrap().slots, 8);
            assert_eq!(with(text, &["--slots=9"]).unwrap().slots, 9);
            return;
        }
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["the_environment_wins", "--quiet"])
            .env("HEADSTART_TEST_SLOTS", "8")
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        let cases: [(&str, Option<&str>, &str); 9] = [
            (
                "model = 'm'\nslot = 7",
                Some("slot"),
                "unknown key, expected one of log-format, model",
            ),
            ("slots = 'many'", Some("slots"), "invalid value 'many'"),
            ("slots = -1", Some("slots"), "invalid value '-1'"),
            ("slots = [1, 2]", Some("slots"), "found an array"),
            ("eager = 'yes'", Some("eager"), "expected true or false, found a text"),
            ("log_format = 'xml'", Some("log_format"), "possible values: text, json"),
            ("[slots]\nx = 1", Some("slots"), "found a table"),
            ("config = 'other.toml'", Some("config"), "unknown key"),
            ("model = 'm'\nslots = = 2", None, ""),
        ];
        for (text, field, message) in cases {
            let error = with(text, &[]).unwrap_err();
            let ConfigError::File { field: found, line, .. } = &error else { panic!("{error}") };
            assert_eq!(found.as_deref(), field, "{error}");
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(*line, field.is_none().then_some(2), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        let error = with(b"model = '\xff'", &[]).unwrap_err().to_string();
        assert!(error.contains("expected UTF-8"), "{error}");
        let error = parse_from::<Options>(["x", "--config", "/nowhere/x.toml"]).unwrap_err();
        assert!(error.to_string().starts_with("/nowhere/x.toml: No such file"), "{error}");
    }

    #[test]
    fn wrong_flags_are_clap_errors_with_code_two() {
        let ConfigError::Usage(error) = with("", &[]).unwrap_err() else {
            panic!("expected usage")
        };
        assert_eq!(error.exit_code(), USAGE_EXIT_CODE);
        assert!(error.to_string().contains("--model"));
    }

    #[test]
    fn durations() {
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "-1", "0", "1e99", "inf", "NaN", "é", "10 h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
