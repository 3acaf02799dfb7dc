//! Reads quotes of trust domains and checks their signatures, for `halyard verify`: a [`QuoteQuestion`] comes on standard
//! input, a [`QuoteAnswer`] goes to standard output. It opens no file and no socket.

use std::fmt::Write;
use std::io::{self, Read};
use std::process::ExitCode;

use api::{QuoteAnswer, QuoteField, QuoteQuestion, QuoteSignature};
use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::quote::{Quote, Report, TDReport10};
use dcap_qvl::verify::QuoteVerifier;

/// The longest question that is read, in bytes: a quote, and collateral, of a few MiB each.
const LONGEST: u64 = 16 << 20;

fn main() -> ExitCode {
    let mut text = String::new();
    if let Err(error) = io::stdin().take(LONGEST).read_to_string(&mut text) {
        eprintln!("halyard-verify: standard input: {error}");
        return ExitCode::FAILURE;
    }
    let answer = match serde_json::from_str(&text) {
        Ok(question) => answer(&question),
        Err(error) => {
            eprintln!("halyard-verify: `halyard verify` asks this program, in JSON: {error}");
            return ExitCode::FAILURE;
        }
    };
    match serde_json::to_string(&answer) {
        Ok(answer) => println!("{answer}"),
        Err(error) => {
            eprintln!("halyard-verify: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn answer(question: &QuoteQuestion) -> QuoteAnswer {
    look(question).unwrap_or_else(|(field, problem)| QuoteAnswer::Problem { field: field.into(), problem })
}

/// What a quote says and what its signature is worth, or the field of the question that cannot be read, and why.
fn look(question: &QuoteQuestion) -> Result<QuoteAnswer, (&'static str, String)> {
    let quote = bytes(&question.quote).ok_or(("quote", "it is not in hexadecimal digits".to_owned()))?;
    let read = Quote::parse(&quote).map_err(|error| ("quote", format!("it is no quote: {error:#}")))?;
    let signature = question.collateral.as_ref().map(|text| check(question, &quote, text)).transpose()?;
    Ok(QuoteAnswer::Quote { fields: fields(&read)?, signature })
}

/// Checks the signature of a quote, with collateral.
fn check(question: &QuoteQuestion, quote: &[u8], collateral: &str) -> Result<QuoteSignature, (&'static str, String)> {
    let collateral: QuoteCollateralV3 = serde_json::from_str(collateral)
        .map_err(|error| ("collateral", format!("it is not what Intel's service gives, in one object: {error}")))?;
    let verifier = match &question.root_ca {
        Some(digits) => {
            let file = bytes(digits).ok_or(("root-ca", "it is not in hexadecimal digits".to_owned()))?;
            QuoteVerifier::new(certificate(file).map_err(|problem| ("root-ca", problem))?)
        }
        None => QuoteVerifier::new_prod(),
    };
    Ok(match verifier.verify(quote, &collateral, question.at) {
        Ok(report) => QuoteSignature::Valid { status: report.status, advisories: report.advisory_ids },
        Err(error) => QuoteSignature::Invalid { reason: format!("{error:#}") },
    })
}

/// The DER of a certificate that is in PEM or DER.
fn certificate(file: Vec<u8>) -> Result<Vec<u8>, String> {
    if !file.starts_with(b"-----BEGIN") {
        return Ok(file);
    }
    pem::parse(file).map(pem::Pem::into_contents).map_err(|error| format!("it is no certificate: {error}"))
}

/// All that a quote says of its trust domain.
fn fields(quote: &Quote) -> Result<Vec<QuoteField>, (&'static str, String)> {
    let field = |name: &str, value: &[u8]| QuoteField { name: name.into(), value: digits(value) };
    let (base, later) = match &quote.report {
        Report::TD10(report) => (report, None),
        Report::TD15(report) => (&report.base, Some(report)),
        Report::TD15Ex(report) => (&report.base.base, Some(&report.base)),
        Report::SgxEnclave(_) => {
            return Err(("quote", "it is a quote of an SGX enclave, and of no trust domain".to_owned()));
        }
    };
    let mut fields = of_trust_domain(base, field);
    if let Some(later) = later {
        fields.push(field("teetcbsvn2", &later.tee_tcb_svn2));
        fields.push(field("mrservicetd", &later.mr_service_td));
    }
    Ok(fields)
}

/// The fields of each TDX quote, in their order.
fn of_trust_domain(report: &TDReport10, field: impl Fn(&str, &[u8]) -> QuoteField) -> Vec<QuoteField> {
    vec![
        field("teetcbsvn", &report.tee_tcb_svn),
        field("mrseam", &report.mr_seam),
        field("mrsignerseam", &report.mr_signer_seam),
        field("seamattributes", &report.seam_attributes),
        field("attributes", &report.td_attributes),
        field("xfam", &report.xfam),
        field("mrtd", &report.mr_td),
        field("mrconfigid", &report.mr_config_id),
        field("mrowner", &report.mr_owner),
        field("mrownerconfig", &report.mr_owner_config),
        field("rtmr0", &report.rt_mr0),
        field("rtmr1", &report.rt_mr1),
        field("rtmr2", &report.rt_mr2),
        field("rtmr3", &report.rt_mr3),
        field("reportdata", &report.report_data),
    ]
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a text never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes of hexadecimal digits.
fn bytes(digits: &str) -> Option<Vec<u8>> {
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let pairs = digits.as_bytes().chunks(2).map(|pair| match pair {
        [high, low] => Some(value(*high)? << 4 | value(*low)?),
        _ => None,
    });
    pairs.collect()
}
