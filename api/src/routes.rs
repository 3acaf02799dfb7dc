//! The API's paths and verbs, in one table: the server routes by it, the client asks by it, and `openapi.json` is
//! generated from it.

use std::borrow::Cow;

/// The verb of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "HTTP's own")]
pub enum Verb {
    Get,
    Put,
    Post,
    Patch,
    Delete,
}

impl Verb {
    /// As HTTP writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Post => "POST",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the table of routes says what each is")]
pub enum Operation {
    Ping,
    GetVersion,
    GetHost,
    GetOpenapi,
    CreateVm,
    GetVm,
    DestroyVm,
    BootVm,
    PauseVm,
    ResumeVm,
    ResetVm,
    ShutdownVm,
    SendNmi,
    ListDevices,
    GetDevice,
    PutDevice,
    PatchDevice,
    RemoveDevice,
    GetVcpus,
    PatchVcpus,
    GetMemory,
    PatchMemory,
    GetQuotes,
    OpenConsole,
    ListJobs,
    GetJob,
    CancelJob,
    ReadEvents,
    GetMetrics,
}

/// One path with one verb.
#[derive(Debug)]
pub struct Route {
    /// What it asks for.
    pub operation: Operation,
    /// Its name in generated clients.
    pub id: &'static str,
    /// The verb.
    pub verb: Verb,
    /// The path; `{id}` stands for one segment.
    pub path: &'static str,
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// The type of the body that it takes, by its name in the schema.
    pub body: Option<&'static str>,
    /// A request without a body is one with `{}`.
    pub body_optional: bool,
    /// What a request that succeeds is answered with.
    pub replies: &'static [Success],
    /// The statuses of problems that are this route's own.
    pub problems: &'static [u16],
}

/// What a request that succeeds is answered with.
#[derive(Debug)]
pub struct Success {
    /// The HTTP status.
    pub status: u16,
    /// What it means.
    pub meaning: &'static str,
    /// What the body is.
    pub content: Content,
}

/// What a reply's body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing.
    None,
    /// JSON of the type with this name in the schema.
    Json(&'static str),
    /// A list of JSON of the type with this name.
    List(&'static str),
    /// Any JSON object.
    Object,
    /// Text of this media type.
    Text(&'static str),
}

/// What a path leads to.
#[derive(Debug)]
pub enum Found<'path> {
    /// A route, and the segment that its `{id}` stands for.
    Route(&'static Route, Option<Cow<'path, str>>),
    /// There are only other verbs on this path.
    OtherVerbs(Vec<Verb>),
    /// There is no such path.
    Nothing,
}

/// The media type of [`Operation::GetMetrics`].
pub const METRICS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// The media type of [`Operation::ReadEvents`].
pub const EVENT_STREAM: &str = "text/event-stream";
/// The protocol that a console's connection is upgraded to: the console's bytes, both ways.
pub const CONSOLE_PROTOCOL: &str = "halyard-console";

const NO_CONTENT: &[Success] = &[Success { status: 204, meaning: "It is done.", content: Content::None }];

const fn json(meaning: &'static str, name: &'static str) -> Success {
    Success { status: 200, meaning, content: Content::Json(name) }
}

const fn get(operation: Operation, id: &'static str, path: &'static str, summary: &'static str) -> Route {
    Route {
        operation,
        id,
        verb: Verb::Get,
        path,
        summary,
        body: None,
        body_optional: false,
        replies: &[],
        problems: &[],
    }
}

const fn action(operation: Operation, id: &'static str, path: &'static str, summary: &'static str) -> Route {
    Route { verb: Verb::Post, replies: NO_CONTENT, problems: &[409], ..get(operation, id, path, summary) }
}

/// Every route.
pub const ROUTES: &[Route] = &[
    Route {
        replies: &[json("The monitor is there.", "Pong")],
        ..get(Operation::Ping, "ping", "/api/v1/ping", "Say whether the monitor is there.")
    },
    Route {
        replies: &[json("The version.", "Version")],
        ..get(Operation::GetVersion, "get_version", "/api/v1/version", "Say which program answers.")
    },
    Route {
        replies: &[json("What the host can do.", "HostReport")],
        ..get(Operation::GetHost, "get_host", "/api/v1/host", "Say what this host can do for VMs, and why not.")
    },
    Route {
        replies: &[Success { status: 200, meaning: "This description.", content: Content::Object }],
        ..get(Operation::GetOpenapi, "get_openapi", "/api/v1/openapi.json", "Describe the API (OpenAPI 3.1).")
    },
    Route {
        verb: Verb::Put,
        body: Some("VmConfig"),
        replies: &[
            json("The VM has this configuration already.", "VmInfo"),
            Success { status: 201, meaning: "The VM is ready to boot.", content: Content::Json("VmInfo") },
        ],
        problems: &[400, 409, 422],
        ..get(
            Operation::CreateVm,
            "create_vm",
            "/api/v1/vm",
            "Create the VM from its configuration. All that it names is opened; nothing runs yet.",
        )
    },
    Route {
        replies: &[json("The VM.", "VmInfo")],
        ..get(Operation::GetVm, "get_vm", "/api/v1/vm", "Show the VM: phase, configuration and outcome.")
    },
    Route {
        verb: Verb::Delete,
        replies: NO_CONTENT,
        ..get(Operation::DestroyVm, "destroy_vm", "/api/v1/vm", "Destroy the VM: there is none afterwards.")
    },
    Route { problems: &[409, 422], ..action(Operation::BootVm, "boot_vm", "/api/v1/vm/actions/boot", "Boot the VM.") },
    action(Operation::PauseVm, "pause_vm", "/api/v1/vm/actions/pause", "Let the VM stand still."),
    action(Operation::ResumeVm, "resume_vm", "/api/v1/vm/actions/resume", "Let a VM that stands still run on."),
    action(Operation::ResetVm, "reset_vm", "/api/v1/vm/actions/reset", "Reset the VM, as its reset button would."),
    Route {
        verb: Verb::Post,
        body: Some("Shutdown"),
        body_optional: true,
        replies: &[Success { status: 202, meaning: "A job waits for the guest.", content: Content::Json("Job") }],
        problems: &[400, 409, 422],
        ..get(
            Operation::ShutdownVm,
            "shutdown_vm",
            "/api/v1/vm/actions/shutdown",
            "Press the guest's power button and wait for it to switch itself off.",
        )
    },
    action(
        Operation::SendNmi,
        "send_nmi",
        "/api/v1/vm/actions/nmi",
        "Send all vCPUs a non-maskable interrupt, which guests can take for an order to dump their memory.",
    ),
    Route {
        replies: &[Success { status: 200, meaning: "The devices.", content: Content::List("DeviceConfig") }],
        ..get(Operation::ListDevices, "list_devices", "/api/v1/vm/devices", "List the VM's devices.")
    },
    Route {
        replies: &[json("The device.", "DeviceConfig")],
        problems: &[404],
        ..get(Operation::GetDevice, "get_device", "/api/v1/vm/devices/{id}", "Show a device.")
    },
    Route {
        verb: Verb::Put,
        body: Some("DeviceConfig"),
        replies: &[
            json("The device has taken the place of the one before.", "DeviceConfig"),
            Success { status: 201, meaning: "The device was added.", content: Content::Json("DeviceConfig") },
            Success {
                status: 202,
                meaning: "A job waits for the guest to take the device.",
                content: Content::Json("Job"),
            },
        ],
        problems: &[400, 409, 412, 422],
        ..get(Operation::PutDevice, "put_device", "/api/v1/vm/devices/{id}", "Add a device, or replace it.")
    },
    Route {
        verb: Verb::Patch,
        body: Some("DevicePatch"),
        replies: &[json("The device as it is now.", "DeviceConfig")],
        problems: &[400, 404, 409, 412, 422],
        ..get(
            Operation::PatchDevice,
            "patch_device",
            "/api/v1/vm/devices/{id}",
            "Change fields of a device (JSON merge patch, RFC 7396): while the VM runs, a disk's size, a card's link and where a console leads.",
        )
    },
    Route {
        verb: Verb::Delete,
        replies: &[
            Success {
                status: 202,
                meaning: "A job waits for the guest to let go of it.",
                content: Content::Json("Job"),
            },
            Success { status: 204, meaning: "It is done.", content: Content::None },
        ],
        problems: &[400, 404, 409, 412],
        ..get(Operation::RemoveDevice, "remove_device", "/api/v1/vm/devices/{id}", "Remove a device.")
    },
    Route {
        replies: &[json("The processors.", "Vcpus")],
        problems: &[404],
        ..get(Operation::GetVcpus, "get_vcpus", "/api/v1/vm/vcpus", "Show the VM's processors.")
    },
    Route {
        verb: Verb::Patch,
        body: Some("VcpusPatch"),
        replies: &[
            json("The processors as they are now.", "Vcpus"),
            Success {
                status: 202,
                meaning: "A job waits for the guest to take them, or to let go of them.",
                content: Content::Json("Job"),
            },
        ],
        problems: &[400, 404, 409, 412, 422],
        ..get(Operation::PatchVcpus, "patch_vcpus", "/api/v1/vm/vcpus", "Change the number of vCPUs.")
    },
    Route {
        replies: &[json("The memory.", "MemoryInfo")],
        problems: &[404],
        ..get(Operation::GetMemory, "get_memory", "/api/v1/vm/memory", "Show the VM's memory.")
    },
    Route {
        verb: Verb::Patch,
        body: Some("MemoryPatch"),
        replies: &[
            json("The memory as it is now.", "MemoryInfo"),
            Success {
                status: 202,
                meaning: "A job waits for the guest to have as much.",
                content: Content::Json("Job"),
            },
        ],
        problems: &[400, 404, 409, 412, 422],
        ..get(Operation::PatchMemory, "patch_memory", "/api/v1/vm/memory", "Change the size of the VM's memory.")
    },
    Route {
        replies: &[json("The quotes.", "Quotes")],
        problems: &[404],
        ..get(
            Operation::GetQuotes,
            "get_quotes",
            "/api/v1/vm/quotes",
            "Show what became of the quotes that a trust domain asked for, and how the quote service is.",
        )
    },
    Route {
        replies: &[Success {
            status: 101,
            meaning: "The connection is the console's: its bytes, both ways.",
            content: Content::None,
        }],
        problems: &[404, 409, 426],
        ..get(
            Operation::OpenConsole,
            "open_console",
            "/api/v1/vm/consoles/{id}",
            "Connect to a console, or to the serial port, whose id is `serial`. Its endpoint must be of the type `api`.",
        )
    },
    Route {
        replies: &[Success { status: 200, meaning: "The jobs.", content: Content::List("Job") }],
        ..get(Operation::ListJobs, "list_jobs", "/api/v1/jobs", "List jobs: those at work, and the last that ended.")
    },
    Route {
        replies: &[json("The job.", "Job")],
        problems: &[404],
        ..get(Operation::GetJob, "get_job", "/api/v1/jobs/{id}", "Show a job.")
    },
    Route {
        verb: Verb::Delete,
        replies: NO_CONTENT,
        problems: &[404],
        ..get(
            Operation::CancelJob,
            "cancel_job",
            "/api/v1/jobs/{id}",
            "Cancel a job. One that has ended stays as it is.",
        )
    },
    Route {
        replies: &[Success {
            status: 200,
            meaning: "Server-sent events: `id` is the event's number, `event` its type, `data` an Event as JSON. The \
                      stream goes on for ever.",
            content: Content::Text(EVENT_STREAM),
        }],
        problems: &[400],
        ..get(Operation::ReadEvents, "read_events", "/api/v1/events", "Read events as they happen.")
    },
    Route {
        replies: &[Success {
            status: 200,
            meaning: "Metrics in Prometheus' text format.",
            content: Content::Text(METRICS_TEXT),
        }],
        ..get(Operation::GetMetrics, "get_metrics", "/metrics", "Show counters and gauges for Prometheus.")
    },
];

/// Finds the route of a verb and path. `path` is without its query.
pub fn find<'path>(verb: &str, path: &'path str) -> Found<'path> {
    let mut others = Vec::new();
    for route in ROUTES {
        let Some(id) = fits(route.path, path) else { continue };
        if route.verb.as_str() == verb {
            return Found::Route(route, id.map(decoded));
        }
        others.push(route.verb);
    }
    if others.is_empty() { Found::Nothing } else { Found::OtherVerbs(others) }
}

/// The route of an operation.
pub fn route_of(operation: Operation) -> Option<&'static Route> {
    ROUTES.iter().find(|route| route.operation == operation)
}

/// Whether a path is one of a template's, and what its `{id}` stands for.
fn fits<'path>(template: &str, path: &'path str) -> Option<Option<&'path str>> {
    match template.strip_suffix("{id}") {
        None => (template == path).then_some(None),
        Some(prefix) => {
            let id = path.strip_prefix(prefix)?;
            (!id.is_empty() && !id.contains('/')).then_some(Some(id))
        }
    }
}

/// A text as a segment of a path, percent-encoded where that is needed (RFC 3986 §2.1).
pub(crate) fn encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut segment, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            segment.push(char::from(byte));
        } else {
            segment += &format!("%{byte:02X}");
        }
        segment
    })
}

/// A segment of a path without its percent-encoding (RFC 3986 §2.1). What is encoded wrongly stays as it is.
fn decoded(segment: &str) -> Cow<'_, str> {
    if !segment.contains('%') {
        return Cow::Borrowed(segment);
    }
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = (*first == b'%').then(|| after.get(..2)).flatten().and_then(|two| std::str::from_utf8(two).ok());
        let digits = digits.filter(|two| two.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match digits.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).map_or(Cow::Borrowed(segment), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_operation_has_one_route_and_one_name() {
        let operations: HashSet<Operation> = ROUTES.iter().map(|route| route.operation).collect();
        let names: HashSet<&str> = ROUTES.iter().map(|route| route.id).collect();
        let places: HashSet<(Verb, &str)> = ROUTES.iter().map(|route| (route.verb, route.path)).collect();
        assert_eq!([operations.len(), names.len(), places.len()], [ROUTES.len(); 3]);
    }

    #[test]
    fn whatever_is_encoded_is_decoded_to_the_same() {
        for text in ["disk0", "a.b_c-d~", "a/b?c=d#e", "x\r\nhost: y", "ä %41", ""] {
            assert_eq!(decoded(&encoded(text)), text);
        }
        assert_eq!(encoded("a/b\n"), "a%2Fb%0A");
    }

    #[test]
    fn paths_are_found_with_their_ids() {
        let operation = |verb, path| match find(verb, path) {
            Found::Route(route, id) => Some((route.operation, id.map(Cow::into_owned))),
            _ => None,
        };
        assert_eq!(operation("GET", "/api/v1/vm"), Some((Operation::GetVm, None)));
        assert_eq!(operation("PUT", "/api/v1/vm/devices/a.b"), Some((Operation::PutDevice, Some("a.b".into()))));
        assert_eq!(
            operation("GET", "/api/v1/vm/devices/%64%69sk%"),
            Some((Operation::GetDevice, Some("disk%".into())))
        );
        for path in ["/", "", "/api/v1/vm/", "/api/v1/vm/devices/", "/api/v1/vm/devices/a/b", "/api/v2/vm", "*"] {
            assert!(matches!(find("GET", path), Found::Nothing), "{path}");
        }
        match find("DELETE", "/api/v1/vm/actions/boot") {
            Found::OtherVerbs(verbs) => assert_eq!(verbs, [Verb::Post]),
            other => panic!("{other:?}"),
        }
    }
}
