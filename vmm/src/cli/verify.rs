//! `halyard verify`: whether a quote is that of the trust domain that `halyard measure` foretells, and its signature Intel's.
//!
//! The quote is read by a program of its own, `halyard-verify`, which lies beside this one: what checks signatures would
//! add a tenth to a monitor that has no use for it.

use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use api::{Confidential, Identity, QuoteAnswer, QuoteField, QuoteQuestion, QuoteSignature, Tdx};
use serde::Serialize;

use super::args::{DomainArgs, MeasureArgs, VerifyArgs};
use super::measure::{foretell, hex};
use super::{BAD_INPUT, DIFFERS, HOST_FAILED, complain, print, print_json};
use crate::logging::Format;

/// The program that reads quotes.
const PROGRAM: &str = "halyard-verify";
/// The most that is read of each file, in bytes.
const LONGEST: u64 = 2 << 20;
/// Bytes of what a report's user may put into it.
const REPORT_DATA: usize = 64;
/// A trust domain's attribute SEPT_VE_DISABLE (Intel TDX Module ABI Specification, ATTRIBUTES). No other is asked for.
const SEPT_VE_DISABLE: u64 = 1 << 28;
/// A platform with which nothing is wrong.
const UP_TO_DATE: &str = "UpToDate";

/// Why nothing can be said of a quote.
enum Failure {
    /// A flag, or a file that it names.
    Input(&'static str, String),
    /// The host.
    Host(String),
    /// It was told already.
    Told(ExitCode),
}

/// What is said of a quote.
#[derive(Debug, Serialize)]
struct Report {
    /// No field differs from what it was to be.
    matches: bool,
    /// And the signature is valid, and the platform as it was to be.
    verified: bool,
    /// Absent where it was not to be checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    signature: Option<QuoteSignature>,
    fields: Vec<Field>,
}

#[derive(Debug, Serialize)]
struct Field {
    name: String,
    value: String,
    /// What it was to be, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<String>,
}

impl Field {
    fn differs(&self) -> bool {
        self.expected.as_ref().is_some_and(|expected| *expected != self.value)
    }
}

/// Says whether a quote is the one that is wanted.
pub fn verify(args: &VerifyArgs, format: Format) -> ExitCode {
    let report = match report(args, format) {
        Ok(report) => report,
        Err(Failure::Input(field, problem)) => {
            complain(format, field, &problem);
            return BAD_INPUT.into();
        }
        Err(Failure::Host(problem)) => {
            complain(format, "", &problem);
            return HOST_FAILED.into();
        }
        Err(Failure::Told(code)) => return code,
    };
    let good = report.verified || args.fields_only && report.matches;
    let code = if good { ExitCode::SUCCESS } else { DIFFERS.into() };
    if args.json { print_json(&report, code, format) } else { print(&text(&report), code, format) }
}

fn report(args: &VerifyArgs, format: Format) -> Result<Report, Failure> {
    let expected = expected(args, format)?;
    let named = |path: &Path, field| read(path).map_err(|error| named(path, field, &error.to_string()));
    let collateral = args.collateral.as_deref().map(|path| named(path, "collateral")).transpose()?;
    let root_ca = args.root_ca.as_deref().map(|path| named(path, "root-ca")).transpose()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let question = QuoteQuestion {
        quote: hex(&named(&args.quote, "quote")?),
        collateral: collateral.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        root_ca: root_ca.as_deref().map(hex),
        at: args.at.unwrap_or(now),
    };
    let (fields, signature) = match ask(&question).map_err(Failure::Host)? {
        QuoteAnswer::Quote { fields, signature } => (fields, signature),
        QuoteAnswer::Problem { field, problem } => return Err(problem_of(args, &field, &problem)),
    };
    let fields: Vec<Field> = fields
        .into_iter()
        .map(|QuoteField { name, value }| {
            let expected = expected.iter().find(|(field, _)| *field == name);
            Field { expected: expected.map(|(_, value)| value.clone()), name, value }
        })
        .collect();
    let matches = !fields.iter().any(Field::differs);
    let signed = signature.as_ref().is_some_and(|signature| accepted(args, signature));
    Ok(Report { matches, verified: matches && signed, signature, fields })
}

/// What fields of the quote are to be, by their names.
fn expected(args: &VerifyArgs, format: Format) -> Result<Vec<(&'static str, String)>, Failure> {
    let mut expected = Vec::new();
    if args.domain != DomainArgs::default() {
        let wanted = MeasureArgs { domain: args.domain.clone(), ..MeasureArgs::default() };
        let (config, report) = foretell(&wanted, format).map_err(Failure::Told)?;
        expected.push(("mrtd", report.mrtd));
        expected.extend(["rtmr0", "rtmr1", "rtmr2"].into_iter().zip(report.rtmr));
        if let Some(Confidential::Tdx(tdx)) = config.and_then(|config| config.confidential) {
            expected.extend(configured(&tdx));
        }
    }
    if let Some(data) = &args.report_data {
        let digits = data.to_lowercase();
        let good = digits.len().is_multiple_of(2) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !good || digits.len() > 2 * REPORT_DATA {
            let problem =
                format!("--report-data {data}: it must be at most {REPORT_DATA} bytes, two hexadecimal digits each");
            return Err(Failure::Input("report-data", problem));
        }
        expected.push(("reportdata", format!("{digits:0<width$}", width = 2 * REPORT_DATA)));
    }
    Ok(expected)
}

/// What a configuration says of its trust domain.
fn configured(tdx: &Tdx) -> [(&'static str, String); 4] {
    let attributes = if tdx.sept_ve_disable { SEPT_VE_DISABLE } else { 0 };
    let identity = |identity: Option<Identity>| identity.unwrap_or(Identity::new([0; 48])).to_string();
    [
        ("attributes", hex(&attributes.to_le_bytes())),
        ("mrconfigid", identity(tdx.config_id)),
        ("mrowner", identity(tdx.owner)),
        ("mrownerconfig", identity(tdx.owner_config)),
    ]
}

/// Whether a signature is one that the caller takes.
fn accepted(args: &VerifyArgs, signature: &QuoteSignature) -> bool {
    match signature {
        QuoteSignature::Valid { status, .. } => status == UP_TO_DATE || args.accept.contains(status),
        QuoteSignature::Invalid { .. } => false,
    }
}

fn named(path: &Path, field: &'static str, problem: &str) -> Failure {
    Failure::Input(field, format!("{}: {problem}", path.display()))
}

fn problem_of(args: &VerifyArgs, field: &str, problem: &str) -> Failure {
    match (field, &args.collateral, &args.root_ca) {
        ("collateral", Some(path), _) => named(path, "collateral", problem),
        ("root-ca", _, Some(path)) => named(path, "root-ca", problem),
        _ => named(&args.quote, "quote", problem),
    }
}

/// Reads a file, or standard input where its name is "-".
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file: Box<dyn Read> = if path == Path::new("-") { Box::new(io::stdin()) } else { Box::new(File::open(path)?) };
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST {
        return Err(io::Error::other("it is longer than 2 MiB"));
    }
    Ok(bytes)
}

/// Has the program beside this one look at a quote.
fn ask(question: &QuoteQuestion) -> Result<QuoteAnswer, String> {
    let question = serde_json::to_string(question).map_err(|error| error.to_string())?;
    let program = std::env::current_exe().map_or_else(|_| PathBuf::from(PROGRAM), |own| own.with_file_name(PROGRAM));
    let failed = |error: &dyn std::fmt::Display| format!("{}, which reads quotes: {error}", program.display());
    let mut child =
        Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|error| failed(&error))?;
    // It answers when it has read everything, so that neither waits for the other.
    if let Some(mut input) = child.stdin.take() {
        input.write_all(question.as_bytes()).map_err(|error| failed(&error))?;
    }
    let output = child.wait_with_output().map_err(|error| failed(&error))?;
    if !output.status.success() {
        return Err(failed(&format!("it ends with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(&error))
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a text never fails.
    for Field { name, value, expected } in &report.fields {
        match expected {
            None => {
                let _ = writeln!(text, "          {name} {value}");
            }
            Some(expected) if expected == value => {
                let _ = writeln!(text, "matches   {name} {value}");
            }
            Some(expected) => {
                let _ = writeln!(text, "DIFFERS   {name} {value}\n          expected {expected}");
            }
        }
    }
    if report.fields.iter().any(|field| field.name.starts_with("rtmr") && field.differs()) {
        text.push_str(
            "          which event makes a register another: halyard measure --event-log FILE, with the guest's log\n",
        );
    }
    let _ = match &report.signature {
        None => writeln!(text, "signature NOT CHECKED: anybody can have written this"),
        Some(QuoteSignature::Invalid { reason }) => writeln!(text, "signature INVALID: {reason}"),
        Some(QuoteSignature::Valid { status, advisories }) => {
            let advisories: String = advisories.iter().map(|advisory| format!(", {advisory}")).collect();
            writeln!(text, "signature valid, platform {status}{advisories}")
        }
    };
    text.push_str(match (report.verified, report.matches) {
        (true, _) => "verified\n",
        (false, true) => "NOT VERIFIED, though no field differs\n",
        (false, false) => "NOT VERIFIED\n",
    });
    text
}
