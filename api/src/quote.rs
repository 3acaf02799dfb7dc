//! Quotes: how a VM's are, and what `halyard verify` asks of one.
//!
//! What `halyard verify` and the program that reads quotes for it, `halyard-verify`, say to each other: an object of JSON
//! on its standard input, and one on its standard output. Bytes are hexadecimal digits.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Quotes that a trust domain has asked for, and the service that signs them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Quotes {
    /// The host's Quote Generation Service.
    pub service: QuoteServiceState,
    /// Requests that are not answered yet, 16 at the most.
    pub in_flight: u64,
    /// Requests that ended with a quote.
    pub given: u64,
    /// Requests for which there was no service.
    pub absent: u64,
    /// Requests that the service did not answer in time.
    pub late: u64,
    /// Requests that the service answered with an error, with what is no answer, or not to the end.
    pub failed: u64,
    /// Calls that were refused because of what the guest gave.
    pub invalid: u64,
    /// Calls that the guest is to make again, since too many requests were in flight.
    pub retried: u64,
    /// The time from request to answer of all requests that ended, in microseconds.
    pub time_us: u64,
    /// The longest of these times.
    pub longest_us: u64,
}

/// How the quote service was when it was last asked, by the guest or by the monitor itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum QuoteServiceState {
    /// None is configured.
    #[default]
    Off,
    /// It was not asked yet.
    Unknown,
    /// It answered.
    Answers,
    /// It did not.
    Fails {
        /// Why.
        reason: String,
    },
}

/// A quote to be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuoteQuestion {
    /// The quote.
    pub quote: String,
    /// What its signature is to be checked with: the text of a file of collateral, as Intel's provisioning certification
    /// service gives it, in one object of JSON. Without it the signature is not checked.
    pub collateral: Option<String>,
    /// The certificate that all others must lead to, as PEM or DER. Without it: Intel's.
    pub root_ca: Option<String>,
    /// The time for which the signature is to be valid, in seconds since 1970 (UTC).
    pub at: u64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuoteAnswer {
    /// It is a quote of a trust domain.
    Quote {
        /// What it says, in its own order.
        fields: Vec<QuoteField>,
        /// What became of its signature, where it was to be checked.
        signature: Option<QuoteSignature>,
    },
    /// It is none, or something else cannot be read.
    Problem {
        /// The field of the question.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// A field of a quote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuoteField {
    /// Its name, as in "mrtd".
    pub name: String,
    /// Its bytes.
    pub value: String,
}

/// What became of a signature that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuoteSignature {
    /// It is that of a TDX module on a platform of Intel's, or of whose root certificate was given.
    Valid {
        /// How the platform's firmware and microcode are: "UpToDate", or what Intel calls it otherwise.
        status: String,
        /// The advisories that apply, as in "INTEL-SA-00837".
        advisories: Vec<String>,
    },
    /// It is not, or that cannot be told.
    Invalid {
        /// Why.
        reason: String,
    },
}
