//! Replies: their bodies, and the problem document that each failure is.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use api::{PROBLEM_JSON, ProblemDocument};
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

use super::events::EventStream;
use crate::request::Refusal;

/// The body of a reply.
pub enum ReplyBody {
    /// All of it, or nothing any more.
    Whole(Option<Bytes>),
    /// Events as they happen.
    Events(EventStream),
}

/// A reply.
pub type Reply = Response<ReplyBody>;

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take()),
            Self::Events(stream) => stream.poll_next(cx),
        };
        next.map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| u64::try_from(bytes.len()).unwrap_or(u64::MAX)))
            }
            Self::Events(_) => SizeHint::default(),
        }
    }
}

/// Why a request is not answered as it wishes.
#[derive(Debug)]
pub struct Problem {
    document: Box<ProblemDocument>,
    /// A header that goes with it.
    header: Option<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// A problem with this status, and what happened.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or_default();
        Self { document: Box::new(ProblemDocument::new(status.as_u16(), title, detail)), header: None }
    }

    /// The same, with a header.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: &str) -> Self {
        self.header = HeaderValue::from_str(value).ok().map(|value| (name, value));
        self
    }

    /// The reply that tells it to the request with this id.
    pub fn into_reply(self, request_id: &str) -> Reply {
        let Self { mut document, header } = self;
        request_id.clone_into(&mut document.request_id);
        let status = StatusCode::from_u16(document.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let bytes = serde_json::to_vec(&document).unwrap_or_default();
        let mut reply = with_type(status, PROBLEM_JSON, bytes.into());
        reply.headers_mut().extend(header);
        reply
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let status = match &refusal {
            Refusal::Phase { .. } | Refusal::Conflict(_) => StatusCode::CONFLICT,
            Refusal::Missing(_) => StatusCode::NOT_FOUND,
            Refusal::Problems(problems) => return unusable(problems),
            Refusal::Changed { .. } => StatusCode::PRECONDITION_FAILED,
            Refusal::Host(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, refusal.to_string())
    }
}

/// The problem that a body's problems are.
pub fn unusable(problems: &api::Problems) -> Problem {
    let detail = match problems.0.as_slice() {
        [one] => one.to_string(),
        all => format!("the body has {} problems", all.len()),
    };
    let Problem { document, header } = Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail);
    Problem { document: Box::new(document.with_problems(&problems.0)), header }
}

/// A reply of JSON.
pub fn json(status: StatusCode, value: &impl Serialize) -> Reply {
    match serde_json::to_vec(value) {
        Ok(bytes) => json_text(status, bytes.into()),
        Err(error) => unwritable(&error),
    }
}

/// A reply of what is JSON already.
pub fn json_text(status: StatusCode, bytes: Bytes) -> Reply {
    with_type(status, "application/json", bytes)
}

/// The reply where there is none.
pub fn unwritable(error: &serde_json::Error) -> Reply {
    let detail = format!("the reply cannot be written: {error}");
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, detail).into_reply("")
}

/// A reply of text.
pub fn text(media: &'static str, text: String) -> Reply {
    with_type(StatusCode::OK, media, text.into())
}

/// A reply of a text that is always there.
pub fn fixed(media: &'static str, text: &'static str) -> Reply {
    with_type(StatusCode::OK, media, Bytes::from_static(text.as_bytes()))
}

/// A reply without a body.
pub fn empty(status: StatusCode) -> Reply {
    let mut reply = Response::new(ReplyBody::Whole(None));
    *reply.status_mut() = status;
    reply
}

fn with_type(status: StatusCode, media: &'static str, bytes: Bytes) -> Reply {
    let mut reply = Response::new(ReplyBody::Whole(Some(bytes)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    reply
}
