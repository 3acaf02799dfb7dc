//! What came back, beside what was sent.

use api::{PROBLEM_JSON, ProblemDocument};

/// Headers that are read: the monitor takes as many.
const HEADERS: usize = 64;

/// A reply.
struct Reply<'a> {
    status: u16,
    media: String,
    body: &'a [u8],
    /// It says that nothing comes after it.
    closes: bool,
}

/// Whether the last reply goes on without an end: events, or a console.
pub fn endless(got: &[u8]) -> bool {
    split(got, |_| false).last().is_some_and(|reply| is_endless(reply))
}

fn is_endless(reply: &Reply) -> bool {
    reply.status == 101 || reply.media == "text/event-stream"
}

/// Holds that each reply is one of the API's, and that there is one to each complete request, up to the first that ends
/// the connection.
pub fn check(sent: &[u8], got: &[u8]) {
    let asked = requests(sent);
    let replies = split(got, |number| asked.get(number).is_some_and(|request| request.head));
    for (number, reply) in replies.iter().enumerate() {
        sound(reply, asked.get(number).is_some_and(|request| request.head));
    }
    let answered = asked.iter().zip(&replies).take_while(|(request, reply)| goes_on(request, reply)).count();
    // The request whose reply is the last, whatever follows.
    let last = usize::from(answered < replies.len() && answered < asked.len());
    let due = if last == 1 { answered + 1 } else { asked.len() };
    assert!(
        replies.len() >= due,
        "{} of {due} requests are answered: {:?}, and to it {:?}",
        replies.len(),
        String::from_utf8_lossy(sent),
        String::from_utf8_lossy(got)
    );
}

/// Whether another reply may follow this one.
fn goes_on(request: &Request, reply: &Reply) -> bool {
    !request.last && !reply.closes && !is_endless(reply)
}

/// A complete request.
struct Request {
    /// Its reply has no body.
    head: bool,
    /// The connection may end behind it.
    last: bool,
}

/// The complete requests, up to the first that has a body or cannot be read: what comes behind that depends on whether its
/// body was wanted.
fn requests(mut sent: &[u8]) -> Vec<Request> {
    let mut all = Vec::new();
    loop {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let Ok(httparse::Status::Complete(length)) = request.parse(sent) else { return all };
        let is = |name: &str| request.headers.iter().any(|header| header.name.eq_ignore_ascii_case(name));
        // The path's syntax is checked behind httparse; such a request is answered with 400 at the most.
        let body = is("content-length") || is("transfer-encoding");
        let (head, last) = (request.method == Some("HEAD"), body || is("connection") || request.version != Some(1));
        if body {
            return all;
        }
        all.push(Request { head, last });
        if last {
            return all;
        }
        sent = &sent[length..];
    }
}

/// Takes replies apart. Those to requests that `head` names have no body.
fn split(mut got: &[u8], head: impl Fn(usize) -> bool) -> Vec<Reply<'_>> {
    let mut replies = Vec::new();
    while !got.is_empty() {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(got).unwrap_or_else(|error| {
            panic!("{error} in a reply: {:?}", String::from_utf8_lossy(got));
        });
        // The monitor, or this client, has ended in the middle.
        let httparse::Status::Complete(length) = parsed else { break };
        let (status, rest) = (response.code.unwrap_or_default(), &got[length..]);
        if status == 100 {
            got = rest;
            continue;
        }
        let header = |name: &str| {
            let found = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
            found.map(|header| String::from_utf8_lossy(header.value).into_owned()).unwrap_or_default()
        };
        let media = header("content-type");
        let closes = header("connection").eq_ignore_ascii_case("close");
        let length = if head(replies.len()) { 0 } else { header("content-length").parse().unwrap_or(0) };
        let Some((body, rest)) = rest.split_at_checked(length) else { break };
        replies.push(Reply { status, media, body, closes });
        if replies.last().is_some_and(is_endless) {
            break;
        }
        got = rest;
    }
    replies
}

/// One reply by itself.
fn sound(reply: &Reply, head: bool) {
    const KNOWN: [u16; 19] =
        [101, 200, 201, 202, 204, 400, 404, 405, 408, 409, 412, 413, 414, 415, 422, 426, 431, 500, 501];
    let text = String::from_utf8_lossy(reply.body);
    assert!(KNOWN.contains(&reply.status), "a reply of the status {}: {text}", reply.status);
    if head {
        return;
    }
    if reply.media == PROBLEM_JSON {
        let document: ProblemDocument = serde_json::from_slice(reply.body).expect("a problem document");
        assert!(document.status == reply.status && !document.detail.is_empty(), "{text}");
    } else if reply.media == "application/json" {
        serde_json::from_slice::<serde::de::IgnoredAny>(reply.body).expect("JSON");
    }
}
