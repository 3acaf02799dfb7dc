//! Counters and gauges in Prometheus' text format.

use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use api::{JobState, PhaseName, QuoteServiceState, Quotes};

use super::ApiCounters;
use super::memory::{Reader, Resident};
use crate::board::Board;
use crate::devices::DeviceCounters;
use crate::machine::MachineCounters;

/// All metrics as they are now.
pub async fn text(board: &Board, api: &ApiCounters, memory: &Reader) -> String {
    let mut page = Page::default();
    of_vm(&mut page, board);
    if let Some(counters) = board.counters() {
        of_vcpus(&mut page, &counters);
        of_devices(&mut page, &counters);
        let help = "Interrupt routes of the hypervisor's that the machine holds.";
        page.gauge("halyard_interrupt_routes", help).sample(&[], counters.routes.load(Ordering::Relaxed));
        if let Some(quotes) = &counters.quotes {
            of_quotes(&mut page, &quotes.figures());
        }
        if let Some(resident) = memory.resident(counters.memory.clone()).await {
            of_memory(&mut page, resident);
        }
    }
    of_api(&mut page, board, api);
    of_process(&mut page);
    page.text
}

/// The text as it grows.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    /// Begins a metric; its samples follow.
    fn metric(&mut self, name: &'static str, kind: &str, help: &str) -> Metric<'_> {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Metric { text: &mut self.text, name }
    }

    fn counter(&mut self, name: &'static str, help: &str) -> Metric<'_> {
        self.metric(name, "counter", help)
    }

    fn gauge(&mut self, name: &'static str, help: &str) -> Metric<'_> {
        self.metric(name, "gauge", help)
    }
}

struct Metric<'page> {
    text: &'page mut String,
    name: &'static str,
}

impl Metric<'_> {
    /// One sample. Values of labels are ids and words of this program, which need no quoting.
    fn sample(&mut self, labels: &[(&str, &dyn Display)], value: impl Display) {
        self.text.push_str(self.name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"{value}\"", if index == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

fn of_vm(page: &mut Page, board: &Board) {
    let (info, _) = board.info();
    let mut phases = page.gauge("halyard_vm_phase", "Whether the VM is in a phase: 1 for the one that it is in.");
    for phase in PhaseName::ALL {
        phases.sample(&[("phase", &phase)], u8::from(phase == info.phase));
    }
    let (vcpus, memory) = board.present();
    page.gauge("halyard_vm_vcpus", "vCPUs that the guest of the running machine has.").sample(&[], vcpus);
    page.gauge("halyard_vm_memory_bytes", "Memory of the running machine.").sample(&[], memory);
    page.gauge("halyard_vm_memory_wanted_bytes", "Memory that the guest is asked to have.")
        .sample(&[], board.wanted_memory());
    page.counter("halyard_events_total", "Events since the start.").sample(&[], info.sequence);
    let jobs = board.jobs();
    let running = jobs.iter().filter(|job| job.state == JobState::Running).count();
    page.gauge("halyard_jobs_running", "Jobs at work.").sample(&[], running);
    page.counter("halyard_jobs_total", "Jobs that were begun.").sample(&[], jobs.last().map_or(0, |job| job.id));
}

fn of_vcpus(page: &mut Page, counters: &MachineCounters) {
    let times: Vec<(u8, (u64, u64))> = counters
        .vcpus
        .iter()
        .map(|(number, vcpu)| (*number, thread_times(vcpu.thread.load(Ordering::Relaxed))))
        .collect();
    let mut run = page.counter("halyard_vcpu_run_seconds_total", "Time that a vCPU's thread ran on a host processor.");
    for (vcpu, (ran, _)) in &times {
        run.sample(&[("vcpu", vcpu)], seconds(*ran));
    }
    let help = "Time that a vCPU's thread was ready to run but had no host processor.";
    let mut wait = page.counter("halyard_vcpu_steal_seconds_total", help);
    for (vcpu, (_, waited)) in &times {
        wait.sample(&[("vcpu", vcpu)], seconds(*waited));
    }
    let mut exits = page.counter("halyard_vcpu_exits_total", "Exits of a vCPU to the monitor.");
    for (vcpu, counters) in &counters.vcpus {
        for (reason, count) in [
            ("pio-read", &counters.pio_reads),
            ("pio-write", &counters.pio_writes),
            ("mmio-read", &counters.mmio_reads),
            ("mmio-write", &counters.mmio_writes),
            ("end-of-interrupt", &counters.interrupt_ends),
            ("kick", &counters.kicks),
        ] {
            exits.sample(&[("vcpu", vcpu), ("reason", &reason)], get(count));
        }
    }
}

fn of_devices(page: &mut Page, counters: &MachineCounters) {
    let disks = || {
        counters.devices.iter().filter_map(|(id, counters)| match counters {
            DeviceCounters::Disk(disk) => Some((id, disk)),
            _ => None,
        })
    };
    if disks().next().is_some() {
        let mut requests = page.counter("halyard_disk_requests_total", "Requests of the guest that a disk has done.");
        for (id, disk) in disks() {
            for (op, count) in
                [("read", &disk.reads), ("write", &disk.writes), ("flush", &disk.flushes), ("discard", &disk.discards)]
            {
                requests.sample(&[("device", id), ("op", &op)], get(count));
            }
        }
        let mut bytes =
            page.counter("halyard_disk_bytes_total", "Bytes that a disk has read or written for the guest.");
        for (id, disk) in disks() {
            for (op, count) in [("read", &disk.read_bytes), ("write", &disk.written_bytes)] {
                bytes.sample(&[("device", id), ("op", &op)], get(count));
            }
        }
        let help = "Time from queue to completion of the requests that a disk has done, all added up.";
        let mut times = page.counter("halyard_disk_request_seconds_total", help);
        for (id, disk) in disks() {
            for (op, count) in [
                ("read", &disk.read_nanoseconds),
                ("write", &disk.write_nanoseconds),
                ("flush", &disk.flush_nanoseconds),
                ("discard", &disk.discard_nanoseconds),
            ] {
                times.sample(&[("device", id), ("op", &op)], seconds(get(count)));
            }
        }
        let mut kicks = page.counter("halyard_disk_kicks_total", "Times that the guest told a disk of requests.");
        disks().for_each(|(id, disk)| kicks.sample(&[("device", id)], get(&disk.kicks)));
        let mut errors = page.counter("halyard_disk_errors_total", "Requests of the guest that failed.");
        disks().for_each(|(id, disk)| errors.sample(&[("device", id)], get(&disk.errors)));
        let mut errors = page.counter("halyard_disk_host_errors_total", "Those of them that failed on the host.");
        disks().for_each(|(id, disk)| errors.sample(&[("device", id)], get(&disk.host_errors)));
    }
    if !counters.faults.is_empty() {
        let help = "Times that a device needed a reset: the guest broke a rule, or the host failed.";
        let mut faults = page.counter("halyard_device_faults_total", help);
        counters.faults.iter().for_each(|(id, count)| faults.sample(&[("device", id)], get(count)));
    }
    of_networks(page, counters);
}

fn of_quotes(page: &mut Page, quotes: &Quotes) {
    let Quotes { service, in_flight, given, absent, late, failed, invalid, retried, time_us, longest_us } = quotes;
    let mut ended = page.counter("halyard_quote_requests_total", "Quotes that the guest asked for, by their end.");
    for (end, count) in [("given", given), ("absent", absent), ("late", late), ("failed", failed)] {
        ended.sample(&[("end", &end)], count);
    }
    let help = "Calls for quotes that were refused: what they gave was wrong, or too many were in flight.";
    let mut refused = page.counter("halyard_quote_refusals_total", help);
    for (reason, count) in [("invalid", invalid), ("in-flight", retried)] {
        refused.sample(&[("reason", &reason)], count);
    }
    page.gauge("halyard_quotes_in_flight", "Quotes that the guest waits for.").sample(&[], in_flight);
    let help = "Time from request to answer of all quotes.";
    page.counter("halyard_quote_request_seconds_total", help).sample(&[], seconds(time_us * 1000));
    let help = "The longest time from request to answer.";
    page.gauge("halyard_quote_request_longest_seconds", help).sample(&[], seconds(longest_us * 1000));
    let help = "Whether the quote service answered when it was last asked.";
    let answers = u8::from(*service == QuoteServiceState::Answers);
    page.gauge("halyard_quote_service_up", help).sample(&[], answers);
}

fn of_memory(page: &mut Page, resident: Resident) {
    let Resident { guest, guest_huge, overhead } = resident;
    page.gauge("halyard_memory_guest_resident_bytes", "The guest's memory that the host has given it.")
        .sample(&[], guest);
    page.gauge("halyard_memory_guest_huge_bytes", "The guest's memory that is in huge pages.").sample(&[], guest_huge);
    page.gauge("halyard_memory_overhead_bytes", "Private memory beside the guest's.").sample(&[], overhead);
}

fn of_networks(page: &mut Page, counters: &MachineCounters) {
    let cards = || {
        counters.devices.iter().filter_map(|(id, counters)| match counters {
            DeviceCounters::Net(card) => Some((id, card)),
            _ => None,
        })
    };
    if cards().next().is_none() {
        return;
    }
    let mut packets = page.counter("halyard_net_packets_total", "Frames to (rx) and from (tx) the guest.");
    for (id, card) in cards() {
        for (direction, count) in [("rx", &card.rx_packets), ("tx", &card.tx_packets)] {
            packets.sample(&[("device", id), ("direction", &direction)], get(count));
        }
    }
    let mut bytes = page.counter("halyard_net_bytes_total", "Bytes of frames to (rx) and from (tx) the guest.");
    for (id, card) in cards() {
        for (direction, count) in [("rx", &card.rx_bytes), ("tx", &card.tx_bytes)] {
            bytes.sample(&[("device", id), ("direction", &direction)], get(count));
        }
    }
    let help = "Times that the guest told a card of buffers to fill (rx) or of frames to send (tx).";
    let mut kicks = page.counter("halyard_net_kicks_total", help);
    for (id, card) in cards() {
        for (direction, count) in [("rx", &card.rx_kicks), ("tx", &card.tx_kicks)] {
            kicks.sample(&[("device", id), ("direction", &direction)], get(count));
        }
    }
    let mut dropped = page.counter("halyard_net_dropped_packets_total", "Frames that were lost on the way.");
    for (id, card) in cards() {
        for (direction, count) in [("rx", &card.rx_dropped), ("tx", &card.tx_dropped)] {
            dropped.sample(&[("device", id), ("direction", &direction)], get(count));
        }
    }
}

fn of_api(page: &mut Page, board: &Board, api: &ApiCounters) {
    let mut replies = page.counter("halyard_api_requests_total", "Requests that were answered, by their status.");
    for (digit, count) in api.replies.iter().enumerate().skip(1) {
        replies.sample(&[("status", &format_args!("{digit}xx"))], count.get());
    }
    let answering = api.nanoseconds.get();
    page.counter("halyard_api_request_seconds_total", "Time spent answering.").sample(&[], seconds(answering));
    page.gauge("halyard_api_requests_in_flight", "Requests that are being answered.").sample(&[], api.in_flight.get());
    page.gauge("halyard_api_connections", "Connections that are open.").sample(&[], api.connections.get());
    page.counter("halyard_api_connections_total", "Connections that were accepted.").sample(&[], api.accepted.get());
    let help = "Connections that were refused, or ended to make room for others.";
    page.counter("halyard_api_connections_refused_total", help).sample(&[], api.refused.get());
    page.gauge("halyard_api_event_readers", "Readers of events.").sample(&[], api.event_readers.get());
    page.counter("halyard_api_events_sent_total", "Events sent to all readers.").sample(&[], api.events_sent.get());
    page.gauge("halyard_config_generation", "The generation of the VM's configuration.")
        .sample(&[], board.generation());
}

fn of_process(page: &mut Page) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    if let Some(resident) = bytes("VmRSS") {
        let help = "Memory of the process that is resident, the guest's included.";
        page.gauge("process_resident_memory_bytes", help).sample(&[], resident);
    }
}

/// Nanoseconds that a thread of this process ran, and waited to run (/proc/PID/schedstat).
fn thread_times(thread: i32) -> (u64, u64) {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap_or_default();
    let mut numbers = text.split_whitespace().map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Nanoseconds as seconds with all their digits.
fn seconds(nanoseconds: u64) -> impl Display {
    format!("{}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000)
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use devices::virtio::blk::BlkCounters;

    #[test]
    fn what_fails_is_counted_by_device() {
        let disk = BlkCounters::default();
        disk.errors.store(5, Ordering::Relaxed);
        disk.host_errors.store(3, Ordering::Relaxed);
        let counters = MachineCounters {
            devices: vec![("d".into(), DeviceCounters::Disk(Arc::new(disk)))],
            faults: vec![("d".into(), Arc::new(AtomicU64::new(7)))],
            ..MachineCounters::default()
        };
        let mut page = Page::default();
        of_devices(&mut page, &counters);
        for line in [
            "halyard_disk_errors_total{device=\"d\"} 5\n",
            "halyard_disk_host_errors_total{device=\"d\"} 3\n",
            "halyard_device_faults_total{device=\"d\"} 7\n",
        ] {
            assert!(page.text.contains(line), "{line} is missing in\n{}", page.text);
        }
    }
    #[test]
    fn quotes_are_counted_by_their_ends() {
        let quotes = Quotes {
            service: QuoteServiceState::Answers,
            given: 3,
            late: 1,
            retried: 2,
            time_us: 1_500_000,
            ..Quotes::default()
        };
        let mut page = Page::default();
        of_quotes(&mut page, &quotes);
        for line in [
            "halyard_quote_requests_total{end=\"given\"} 3\n",
            "halyard_quote_requests_total{end=\"late\"} 1\n",
            "halyard_quote_refusals_total{reason=\"in-flight\"} 2\n",
            "halyard_quote_request_seconds_total 1.500000000\n",
            "halyard_quote_service_up 1\n",
        ] {
            assert!(page.text.contains(line), "{line} is missing in\n{}", page.text);
        }
    }
}
