//! Jobs that requests begin, and their ends.

use api::{Job, JobState};
use vmm::request::{Answer, Refusal};

use super::service::Service;

/// The job that a request has begun.
#[track_caller]
pub fn job(answer: Result<Answer, Refusal>) -> u64 {
    match answer {
        Ok(Answer::Job(job)) => job,
        other => panic!("a job does it: {other:?}"),
    }
}

/// Waits for the end of a job.
#[track_caller]
pub fn end_of(service: &Service, job: u64) -> Job {
    service.wait_for("the end of a job", |service| service.board.job(job).unwrap().state != JobState::Running);
    service.board.job(job).unwrap()
}
