//! Consoles that clients open, and where they lead.

use api::{Console, DeviceConfig, Endpoint, Problem, Problems};
use devices::endpoint::ReserveError;

use super::Owner;
use super::phase::Live;
use crate::request::{Answer, Refusal};

impl Owner {
    /// Sets a console's place aside for a client.
    pub(super) fn open_console(&mut self, id: &str, take_over: bool) -> Result<Answer, Refusal> {
        let Some(live) = self.phase.live() else { return Ok(Answer::Done) };
        let endpoint = live.endpoints.get(id);
        let endpoint = endpoint.ok_or_else(|| Refusal::Missing(format!("there is no console «{id}»")))?;
        endpoint.reserve(take_over).map(Answer::Console).map_err(|error| match error {
            ReserveError::Elsewhere => Refusal::Conflict(format!(
                "«{id}» leads elsewhere on the host: give it the endpoint {{\"type\": \"api\"}} to reach it here"
            )),
            ReserveError::Taken => Refusal::Conflict(format!("«{id}» has a client already: take it over, or wait")),
        })
    }

    /// Has a console of a machine lead where it is wanted to, unless it does.
    pub(super) fn lead_console(&mut self, wanted: &Console) -> Result<(), Refusal> {
        let Some(Live { endpoints, prepared, .. }) = self.phase.live() else { return Ok(()) };
        let Some(DeviceConfig::Console(console)) = prepared.given_device(&wanted.id) else { return Ok(()) };
        if console.endpoint == wanted.endpoint {
            return Ok(());
        }
        check_no_stdio(&console.endpoint)?;
        check_no_stdio(&wanted.endpoint)?;
        let facts = &self.facts;
        let device = DeviceConfig::Console(wanted.clone());
        let config = prepared.with_changed(device, |config| api::validate_running(config, facts))?;
        Ok(endpoints.lead(&config, &wanted.id)?)
    }
}

/// Standard input and output are not for a console of a machine that runs.
pub(super) fn check_no_stdio(endpoint: &Endpoint) -> Result<(), Refusal> {
    if *endpoint != (Endpoint::Stdio {}) {
        return Ok(());
    }
    let problem = "standard input and output are a console's from when the VM boots until it ends, or not at all";
    let remedy = "choose file, socket, pty, api or off for another console";
    Err(Refusal::Problems(Problems(vec![Problem::new("endpoint", problem, remedy)])))
}
