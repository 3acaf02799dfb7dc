//! Adds a device to a monitor's VM by a descriptor that goes along with the request, says "asked" once the guest is asked, and
//! waits until it has it: what a shim does for a monitor that may open nothing itself.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use api::{Client, DeviceConfig, Disk, JobState, Net};
use halyard_tests::network;

const USAGE: &str = "usage: put-device SOCKET ID disk --file PATH | put-device SOCKET ID net --tap NAME";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("put-device: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, id, kind, flag, value] = words.as_slice() else { bail!(USAGE) };
    let (device, file): (_, File) = match (kind.as_str(), flag.as_str()) {
        ("disk", "--file") => {
            let file = OpenOptions::new().read(true).write(true).open(value).context(value.clone())?;
            (DeviceConfig::Disk(Disk { path: None, fd: Some(3), ..Disk::new("") }), file)
        }
        ("net", "--tap") => {
            let file = network::open_tap(value).context(value.clone())?;
            (DeviceConfig::Net(Net { fd: Some(3), ..Net::default() }), file)
        }
        _ => bail!(USAGE),
    };
    let mut client = Client::connect(socket)?;
    let mut events = client.events(None)?;
    let Some(job) = client.put_device_on(id, &device, &[file.as_fd()])? else {
        // There is no guest to take it yet.
        return Ok(());
    };
    println!("asked");
    let ended = events.find_map(|event| match event {
        Ok(api::Event { event: api::EventKind::Job { job: now }, .. })
            if now.id == job.id && now.state != JobState::Running =>
        {
            Some(now)
        }
        _ => None,
    });
    let ended = ended.context("the monitor ended")?;
    ensure!(ended.state == JobState::Succeeded, "{ended:?}");
    Ok(())
}
