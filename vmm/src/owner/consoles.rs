//! Consoles that clients open.

use devices::endpoint::ReserveError;

use super::Owner;
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
}
