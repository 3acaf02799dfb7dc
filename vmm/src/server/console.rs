//! A console's connection: the client's socket is handed to the console's endpoint, and the API has nothing more to do
//! with its bytes.

use devices::endpoint::Reservation;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use hyper::{Request, StatusCode};

use super::reply::{Problem, Reply, empty};
use super::stream::ClientStream;
use api::routes::CONSOLE_PROTOCOL;

/// Whether a request asks for its connection to become a console's.
pub fn wants_upgrade(headers: &HeaderMap) -> bool {
    let has = |name, word: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    has(CONNECTION, "upgrade") && has(UPGRADE, CONSOLE_PROTOCOL)
}

/// What a request that does not ask for it is told.
pub fn upgrade_required() -> Problem {
    let detail = format!("a console is a stream: send `Connection: upgrade` and `Upgrade: {CONSOLE_PROTOCOL}`");
    Problem::new(StatusCode::UPGRADE_REQUIRED, detail).with_header(UPGRADE, CONSOLE_PROTOCOL)
}

/// Lets the connection of `request` become the client of a console, whose place was set aside.
pub fn hand_over(request: &mut Request<Incoming>, reservation: Reservation) -> Reply {
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        let upgraded = match upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => return tracing::debug!("API: a console's client is gone: {error}"),
        };
        let Ok(parts) = upgraded.downcast::<ClientStream>() else { return };
        let attached = parts.io.into_socket().and_then(|socket| reservation.attach(socket, &parts.read_buf));
        if let Err(error) = attached {
            tracing::warn!("API: a console's client cannot be connected: {error}");
        }
    });
    let mut reply = empty(StatusCode::SWITCHING_PROTOCOLS);
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    reply.headers_mut().insert(UPGRADE, HeaderValue::from_static(CONSOLE_PROTOCOL));
    reply
}
