//! From a request to its reply.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use api::routes::{Found, METRICS_TEXT, Operation, Route, Verb, find};
use api::{BodyError, DeviceConfig, MemoryInfo, Pong, Vcpus, Version, VmConfig, parse_body};
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, LOCATION};
use hyper::{Method, Request, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;

use super::connections::{Activity, Connection};
use super::events::EventStream;
use super::reply::{Problem, Reply, ReplyBody, empty, fixed, json, json_text, text, unusable, unwritable};
use super::{Context, console};
use crate::request::{Answer, Asked, Change, Descriptors, Request as Ask};

/// The most bytes of a request's body.
const MAX_BODY: usize = api::MAX_CONFIG_BYTES;
/// The most bytes of a body that is read at once with all others; of larger ones, only so many are.
const SMALL_BODY: usize = 32 << 10;
pub const LARGE_BODIES: usize = 2;
/// How long a client may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(10);
/// The longest request id that is taken from a client.
const MAX_REQUEST_ID: usize = 128;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

type Outcome = Result<Reply, Problem>;

/// Answers a request, logs it and counts it.
pub async fn answer(context: &Arc<Context>, connection: &Arc<Connection>, request: Request<Incoming>) -> Reply {
    let started = Instant::now();
    let counters = &context.counters;
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    connection.does(Activity::Working);
    counters.in_flight.add(1);
    let done = InFlight { context, connection };
    let outcome = route(context, connection, request).await;
    // Descriptors that nobody claimed are closed with their request.
    drop(connection.received.take());
    drop(done);
    let mut reply = outcome.unwrap_or_else(|problem| problem.into_reply(&id));
    if matches!(reply.body(), ReplyBody::Events(_)) {
        // It goes on after this: nobody may have its place.
        connection.does(Activity::Working);
    }
    let headers = reply.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, value);
    }
    let status = reply.status().as_u16();
    let took = started.elapsed();
    counters.nanoseconds.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    if let Some(count) = counters.replies.get(usize::from(status / 100)) {
        count.add(1);
    }
    log(connection, &Logged { id: &id, method: &method, path: &path, status, took });
    reply
}

struct Logged<'a> {
    id: &'a str,
    method: &'a Method,
    path: &'a str,
    status: u16,
    took: Duration,
}

/// What changes something is logged; what only reads is a detail.
fn log(connection: &Connection, request: &Logged<'_>) {
    let Logged { id, method, path, status, took } = request;
    let (pid, uid, us) = (connection.pid, connection.uid, took.as_micros());
    if matches!(**method, Method::GET | Method::HEAD) {
        tracing::debug!(request = id, pid, uid, status, us, "API: {method} {path}");
    } else {
        tracing::info!(request = id, pid, uid, status, us, "API: {method} {path}");
    }
}

/// A request that is being answered: however that ends, it is not in flight afterwards.
struct InFlight<'a> {
    context: &'a Context,
    connection: &'a Connection,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.context.counters.in_flight.sub(1);
        self.connection.does(Activity::Idle);
    }
}

/// The client's id for its request, where it is one that a log can hold, or else a new one.
fn request_id(headers: &HeaderMap) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    static PID: LazyLock<u32> = LazyLock::new(std::process::id);
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let usable = |id: &&str| (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
    match given.filter(usable) {
        Some(id) => id.to_owned(),
        None => format!("{}-{}", *PID, NEXT.fetch_add(1, Ordering::Relaxed)),
    }
}

async fn route(context: &Arc<Context>, connection: &Arc<Connection>, mut request: Request<Incoming>) -> Outcome {
    let path = request.uri().path().to_owned();
    let verb = if request.method() == Method::HEAD { "GET" } else { request.method().as_str() };
    let (route, id) = match find(verb, &path) {
        Found::Route(route, id) => (route, id.map(std::borrow::Cow::into_owned).unwrap_or_default()),
        Found::OtherVerbs(verbs) => return Err(other_verbs(verb, &verbs)),
        Found::Nothing => return Err(Problem::new(StatusCode::NOT_FOUND, "there is no such path")),
    };
    let (body, _place) = match route.body {
        Some(_) => read_json(context, connection, &mut request, route).await?,
        None => (String::new(), None),
    };
    let headers = request.headers();
    match route.operation {
        Operation::Ping => Ok(json(StatusCode::OK, &Pong { pid: std::process::id() })),
        Operation::GetVersion => Ok(json(StatusCode::OK, &version())),
        Operation::GetHost => Ok(json(StatusCode::OK, &context.host)),
        Operation::GetOpenapi => Ok(fixed("application/json", api::OPENAPI_JSON)),
        Operation::GetMetrics => Ok(metrics(context).await),
        Operation::CreateVm => create(context, connection, &body).await,
        Operation::GetVm => Ok(vm(context, StatusCode::OK)),
        Operation::DestroyVm => done(context, Ask::Destroy).await,
        Operation::BootVm => done(context, Ask::Boot).await,
        Operation::PauseVm => done(context, Ask::Pause).await,
        Operation::ResumeVm => done(context, Ask::Resume).await,
        Operation::ResetVm => done(context, Ask::Reset).await,
        Operation::SendNmi => done(context, Ask::Nmi).await,
        Operation::ShutdownVm => shutdown(context, &body).await,
        Operation::ListDevices => {
            let (info, _) = context.board.info();
            Ok(json(StatusCode::OK, &info.running.map(|config| config.devices).unwrap_or_default()))
        }
        Operation::GetDevice => device(context, StatusCode::OK, &id),
        Operation::PutDevice => put_device(context, connection, headers, &id, &body).await,
        Operation::PatchDevice => patch_device(context, connection, headers, &id, &body).await,
        Operation::RemoveDevice => remove_device(context, headers, id, request.uri().query()).await,
        Operation::GetVcpus | Operation::GetMemory => part(context, route.operation),
        Operation::PatchVcpus => match change(context, headers, Change::Vcpus(parse(&body, "VcpusPatch")?)).await? {
            Answer::Job(job) => accepted(context, job),
            _ => part(context, Operation::GetVcpus),
        },
        Operation::GetQuotes => quotes(context),
        Operation::PatchMemory => match change(context, headers, Change::Memory(parse(&body, "MemoryPatch")?)).await? {
            Answer::Job(job) => accepted(context, job),
            _ => part(context, Operation::GetMemory),
        },
        Operation::OpenConsole => open_console(context, request, id).await,
        Operation::ListJobs => Ok(json(StatusCode::OK, &context.board.jobs())),
        Operation::GetJob => {
            let job = id.parse().ok().and_then(|id| context.board.job(id));
            job.map(|job| json(StatusCode::OK, &job)).ok_or_else(|| no_job(&id))
        }
        Operation::CancelJob => {
            let number = id.parse().map_err(|_| no_job(&id))?;
            done(context, Ask::CancelJob(number)).await
        }
        Operation::ReadEvents => events(context, connection, headers),
    }
}

fn other_verbs(verb: &str, verbs: &[Verb]) -> Problem {
    let mut names: Vec<&str> = verbs.iter().map(|verb| verb.as_str()).collect();
    if names.contains(&"GET") {
        names.push("HEAD");
    }
    let allowed = names.join(", ");
    let detail = format!("{verb} is not possible here; {allowed} are");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail).with_header(ALLOW, &allowed)
}

async fn metrics(context: &Context) -> Reply {
    text(METRICS_TEXT, super::metrics::text(&context.board, &context.counters, &context.memory).await)
}

fn no_job(id: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no job «{id}»"))
}

fn version() -> Version {
    Version { name: "halyard".into(), version: env!("CARGO_PKG_VERSION").into(), api: "v1".into() }
}

/// Asks the owner and waits for its answer.
async fn ask(context: &Context, request: Ask) -> Result<Answer, Problem> {
    let (sender, receiver) = oneshot::channel();
    let reply = Box::new(move |answer| {
        // A client that is gone does not hear it; what it asked for is done all the same.
        drop(sender.send(answer));
    });
    context.inbox.ask(Asked { request, reply });
    match receiver.await {
        Ok(answer) => answer.map_err(Problem::from),
        Err(_) => Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the monitor is at its end")),
    }
}

async fn done(context: &Context, request: Ask) -> Outcome {
    ask(context, request).await.map(|_| empty(StatusCode::NO_CONTENT))
}

async fn create(context: &Context, connection: &Connection, body: &str) -> Outcome {
    let config: VmConfig = parse(body, "VmConfig")?;
    let descriptors = claim(connection)?;
    let answer = ask(context, Ask::Create { config: Box::new(config), descriptors }).await?;
    Ok(vm(context, status_of(&answer)))
}

fn status_of(answer: &Answer) -> StatusCode {
    if matches!(answer, Answer::Created) { StatusCode::CREATED } else { StatusCode::OK }
}

fn vm(context: &Context, status: StatusCode) -> Reply {
    match context.board.info_json() {
        Ok((text, generation)) => tagged(json_text(status, text), generation),
        Err(error) => unwritable(&error),
    }
}

async fn shutdown(context: &Context, body: &str) -> Outcome {
    let Answer::Job(id) = ask(context, Ask::Shutdown(parse(body, "Shutdown")?)).await? else {
        return Err(Problem::new(StatusCode::CONFLICT, "there is no VM to shut down any more"));
    };
    accepted(context, id)
}

/// The reply to what a job does.
fn accepted(context: &Context, id: u64) -> Outcome {
    let job = context.board.job(id).ok_or_else(|| no_job(&id.to_string()))?;
    let mut reply = json(StatusCode::ACCEPTED, &job);
    if let Ok(value) = HeaderValue::from_str(&format!("/api/v1/jobs/{id}")) {
        reply.headers_mut().insert(LOCATION, value);
    }
    Ok(reply)
}

async fn change(context: &Context, headers: &HeaderMap, change: Change) -> Result<Answer, Problem> {
    let expected = expected(headers, context.board.generation())?;
    ask(context, Ask::Change { change, expected }).await
}

fn device(context: &Context, status: StatusCode, id: &str) -> Outcome {
    let (info, generation) = context.board.info();
    let devices = info.running.map(|config| config.devices).unwrap_or_default();
    let found = devices.into_iter().find(|device| device.id() == id);
    let device = found.ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("there is no device «{id}»")))?;
    Ok(tagged(json(status, &device), generation))
}

async fn put_device(context: &Context, connection: &Connection, headers: &HeaderMap, id: &str, body: &str) -> Outcome {
    let mut device: DeviceConfig = parse(body, "DeviceConfig")?;
    if device.id().is_empty() {
        device.set_id(id);
    } else if device.id() != id {
        let problem = api::Problem::new("id", format!("it is not the path's, «{id}»"), "leave one of them out");
        return Err(unusable(&api::Problems(vec![problem])));
    }
    let descriptors = claim(connection)?;
    let answer = change(context, headers, Change::PutDevice { device: Box::new(device), descriptors }).await?;
    device_after(context, &answer, id)
}

async fn remove_device(context: &Context, headers: &HeaderMap, id: String, query: Option<&str>) -> Outcome {
    let force = switch(query, "force")?;
    match change(context, headers, Change::RemoveDevice { id, force }).await? {
        Answer::Job(job) => accepted(context, job),
        _ => Ok(empty(StatusCode::NO_CONTENT)),
    }
}

/// The one switch that a query can hold.
fn switch(query: Option<&str>, name: &str) -> Result<bool, Problem> {
    let value = query.and_then(|query| query.strip_prefix(name));
    match (query, value) {
        (None | Some(""), _) | (_, Some("=false")) => Ok(false),
        (_, Some("=true")) => Ok(true),
        _ => Err(bad_request(format!("the query can be `{name}=true` or `{name}=false`"))),
    }
}

/// The device as a change left it, or the job that does it. A later change may have removed the device already.
fn device_after(context: &Context, answer: &Answer, id: &str) -> Outcome {
    if let Answer::Job(job) = answer {
        return accepted(context, *job);
    }
    self::device(context, status_of(answer), id)
}

async fn patch_device(
    context: &Context,
    connection: &Connection,
    headers: &HeaderMap,
    id: &str,
    body: &str,
) -> Outcome {
    let patch: Value = serde_json::from_str(body).map_err(|error| bad_request(error.to_string()))?;
    if !patch.is_object() {
        let problem = api::Problem::new("", "fields of the device must stand here", "");
        return Err(unusable(&api::Problems(vec![problem])));
    }
    let (info, generation) = context.board.info();
    let devices = info.config.map(|config| config.devices).unwrap_or_default();
    let known = info.running.map(|config| config.devices).unwrap_or_default();
    let at = known.iter().position(|device| device.id() == id);
    let old = at.and_then(|at| devices.into_iter().nth(at));
    let old = old.ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("there is no device «{id}»")))?;
    let mut whole = serde_json::to_value(&old).unwrap_or_default();
    merge(&mut whole, patch);
    let mut device: DeviceConfig = parse(&whole.to_string(), "DeviceConfig")?;
    if device.id() != id && !device.id().is_empty() {
        let problem = api::Problem::new("id", "a device's id cannot be changed", "remove it and add another");
        return Err(unusable(&api::Problems(vec![problem])));
    }
    device.set_id(id);
    let descriptors = claim(connection)?;
    // What the patch was applied to must still be so.
    let expected = Some(expected(headers, generation)?.unwrap_or(generation));
    let change = Change::PutDevice { device: Box::new(device), descriptors };
    let answer = ask(context, Ask::Change { change, expected }).await?;
    device_after(context, &answer, id)
}

/// Applies a JSON merge patch (RFC 7396).
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Some(target) = target.as_object_mut() else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

fn part(context: &Context, operation: Operation) -> Outcome {
    let (info, generation) = context.board.info();
    let (vcpus, memory) = context.board.present();
    let config = info.running.ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "there is no VM"))?;
    let reply = match operation {
        Operation::GetVcpus => json(StatusCode::OK, &Vcpus { config: config.cpus, present: vcpus }),
        _ => {
            let wanted = context.board.wanted_memory();
            json(StatusCode::OK, &MemoryInfo { config: config.memory, present: memory, wanted })
        }
    };
    Ok(tagged(reply, generation))
}

fn quotes(context: &Context) -> Outcome {
    let counters = context.board.counters().and_then(|counters| counters.quotes.clone());
    let counters = counters.ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "no trust domain runs"))?;
    Ok(json(StatusCode::OK, &counters.figures()))
}

async fn open_console(context: &Context, mut request: Request<Incoming>, id: String) -> Outcome {
    let take_over = switch(request.uri().query(), "takeover")?;
    if !console::wants_upgrade(request.headers()) {
        return Err(console::upgrade_required());
    }
    match ask(context, Ask::OpenConsole { id, take_over }).await? {
        Answer::Console(reservation) => Ok(console::hand_over(&mut request, reservation)),
        _ => Err(Problem::new(StatusCode::CONFLICT, "the VM has no consoles now")),
    }
}

fn events(context: &Context, connection: &Arc<Connection>, headers: &HeaderMap) -> Outcome {
    let after = match headers.get(LAST_EVENT_ID) {
        None => context.board.sequence(),
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
            number.ok_or_else(|| bad_request("`Last-Event-ID` must be the number of an event"))?
        }
    };
    let stream = EventStream::new(context.board.clone(), context.counters.clone(), after, connection.clone());
    let stream = stream.map_err(|error| {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, format!("the connection cannot be watched: {error}"))
    })?;
    let mut reply = hyper::Response::new(ReplyBody::Events(stream));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(api::routes::EVENT_STREAM));
    Ok(reply)
}

fn bad_request(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

/// Gives a reply the tag of the configuration's generation.
fn tagged(mut reply: Reply, generation: u64) -> Reply {
    if let Ok(value) = HeaderValue::from_str(&format!("\"{generation}\"")) {
        reply.headers_mut().insert(ETAG, value);
    }
    reply
}

/// The generation that the request is for, where it names some (RFC 9110 §13.1.1).
fn expected(headers: &HeaderMap, is: u64) -> Result<Option<u64>, Problem> {
    let Some(value) = headers.get(IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    if text.trim() == "*" || text.split(',').any(|tag| tag.trim() == format!("\"{is}\"")) {
        return Ok(Some(is));
    }
    let detail = format!("the configuration's tag is \"{is}\", and `If-Match` names another");
    Err(Problem::new(StatusCode::PRECONDITION_FAILED, detail))
}

/// The descriptors that came with the request.
fn claim(connection: &Connection) -> Result<Descriptors, Problem> {
    connection.received.take().map(Descriptors::sent).map_err(|error| bad_request(error.to_string()))
}

fn parse<T: DeserializeOwned>(body: &str, type_name: &str) -> Result<T, Problem> {
    parse_body(body, type_name).map_err(|error| match error {
        BodyError::Syntax(problem) => bad_request(problem),
        BodyError::Problems(problems) => unusable(&problems),
    })
}

/// Checks that a body is said to be JSON, if anything is said of it.
fn check_type(headers: &HeaderMap, verb: Verb) -> Result<(), Problem> {
    let Some(media) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let media = media.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let patch = verb == Verb::Patch && media.eq_ignore_ascii_case("application/merge-patch+json");
    if media.eq_ignore_ascii_case("application/json") || patch {
        return Ok(());
    }
    let detail = format!("the body is of the type «{media}»; send application/json");
    Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail))
}

/// Reads the body of a request, and its place among large ones.
async fn read_json<'a>(
    context: &'a Context,
    connection: &Connection,
    request: &mut Request<Incoming>,
    route: &Route,
) -> Result<(String, Option<SemaphorePermit<'a>>), Problem> {
    check_type(request.headers(), route.verb)?;
    connection.does(Activity::Reading);
    let read = timeout(BODY_TIME, read_text(&context.large_bodies, request.body_mut())).await;
    connection.does(Activity::Working);
    let late = |_| Problem::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time");
    let (text, place) = read.map_err(late)??;
    Ok((if text.is_empty() && route.body_optional { "{}".into() } else { text }, place))
}

/// Reads a body, all of it. A large one waits for a place, which it keeps.
async fn read_text<'a>(
    large: &'a Semaphore,
    body: &mut Incoming,
) -> Result<(String, Option<SemaphorePermit<'a>>), Problem> {
    let too_large = || {
        let detail = format!("the body is larger than {} KiB", MAX_BODY >> 10);
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    };
    if body.size_hint().lower() > u64::try_from(MAX_BODY).unwrap_or(u64::MAX) {
        return Err(too_large());
    }
    let (mut bytes, mut place) = (Vec::new(), None);
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
        let frame = frame.map_err(|error| bad_request(format!("the body cannot be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > MAX_BODY {
            return Err(too_large());
        }
        if bytes.len() + data.len() > SMALL_BODY && place.is_none() {
            place = large.acquire().await.ok();
        }
        bytes.extend_from_slice(&data);
    }
    let text = String::from_utf8(bytes).map_err(|_| bad_request("the body is not text in UTF-8"))?;
    Ok((text, place))
}
