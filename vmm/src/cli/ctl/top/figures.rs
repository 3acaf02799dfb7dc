//! Figures out of metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use api::{PhaseName, VmInfo};
use serde::Serialize;

/// Metrics as they were at a moment: their names and labels with their values.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    values: BTreeMap<String, f64>,
    /// The values are counted per second.
    rates: bool,
}

impl Sample {
    /// Reads Prometheus' text format, as far as this monitor writes it.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let pairs = lines.filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Self { values: pairs.collect(), rates: false }
    }

    /// What was counted since `before`, per second. What is no counter stays as it is.
    pub fn rates(&self, before: &Self, elapsed: Duration) -> Self {
        let per_second = |(name, value): (&String, &f64)| {
            let is_counter = name.split('{').next().unwrap_or_default().ends_with("_total");
            let old = before.values.get(name).copied().unwrap_or(0.0);
            // A machine that was made anew counts from nothing again.
            let counted = if *value < old { *value } else { value - old };
            let rate = counted / elapsed.as_secs_f64().max(0.001);
            (name.clone(), if is_counter { rate } else { *value })
        };
        Self { values: self.values.iter().map(per_second).collect(), rates: true }
    }

    fn get(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or(0.0)
    }

    /// The values that a label has in a metric, in the order in which it is written: numbers by their size.
    fn labels(&self, metric: &str, label: &str) -> Vec<String> {
        let begin = format!("{metric}{{{label}=\"");
        let of_metric = self.values.keys().filter_map(|name| name.strip_prefix(begin.as_str())?.split('"').next());
        let mut found: Vec<String> = of_metric.map(str::to_owned).collect();
        found.sort_by(|one, other| (one.len(), one).cmp(&(other.len(), other)));
        found.dedup();
        found
    }
}

/// What a VM does: totals, or rates per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Where the VM is in its life.
    pub phase: PhaseName,
    /// Numbers are per second.
    pub rates: bool,
    /// How many vCPUs there are.
    pub vcpus: f64,
    /// The guest's memory.
    pub memory_bytes: f64,
    /// What of the monitor, its guest included, is in the host's memory.
    pub resident_bytes: f64,
    /// Each vCPU.
    pub vcpu: Vec<Vcpu>,
    /// Each disk.
    pub disk: Vec<Disk>,
    /// Each network card.
    pub net: Vec<Net>,
}

/// What a vCPU does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Vcpu {
    pub vcpu: String,
    pub run_seconds: f64,
    pub steal_seconds: f64,
    pub exits: f64,
    pub pio: f64,
    pub mmio: f64,
    pub kicks: f64,
}

/// What a disk does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Disk {
    pub device: String,
    pub reads: f64,
    pub writes: f64,
    pub flushes: f64,
    pub read_bytes: f64,
    pub written_bytes: f64,
    pub errors: f64,
}

/// What a network card does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Net {
    pub device: String,
    pub rx_packets: f64,
    pub tx_packets: f64,
    pub rx_bytes: f64,
    pub tx_bytes: f64,
    pub rx_dropped: f64,
    pub tx_dropped: f64,
}

impl Figures {
    /// The figures of a VM.
    pub fn new(vm: &VmInfo, sample: &Sample) -> Self {
        let of = |metric: &str, label: &str| sample.labels(metric, label);
        Self {
            phase: vm.phase,
            rates: sample.rates,
            vcpus: sample.get("halyard_vm_vcpus"),
            memory_bytes: sample.get("halyard_vm_memory_bytes"),
            resident_bytes: sample.get("process_resident_memory_bytes"),
            vcpu: of("halyard_vcpu_run_seconds_total", "vcpu").into_iter().map(|id| vcpu(sample, id)).collect(),
            disk: of("halyard_disk_errors_total", "device").into_iter().map(|id| disk(sample, id)).collect(),
            net: of("halyard_net_packets_total", "device").into_iter().map(|id| net(sample, id)).collect(),
        }
    }
}

fn vcpu(sample: &Sample, vcpu: String) -> Vcpu {
    let exits = |reason: &str| sample.get(&format!("halyard_vcpu_exits_total{{vcpu=\"{vcpu}\",reason=\"{reason}\"}}"));
    let pio = exits("pio-read") + exits("pio-write");
    let mmio = exits("mmio-read") + exits("mmio-write");
    let kicks = exits("kick");
    Vcpu {
        run_seconds: sample.get(&format!("halyard_vcpu_run_seconds_total{{vcpu=\"{vcpu}\"}}")),
        steal_seconds: sample.get(&format!("halyard_vcpu_steal_seconds_total{{vcpu=\"{vcpu}\"}}")),
        exits: pio + mmio + kicks + exits("end-of-interrupt"),
        pio,
        mmio,
        kicks,
        vcpu,
    }
}

fn disk(sample: &Sample, device: String) -> Disk {
    let of =
        |metric: &str, op: &str| sample.get(&format!("halyard_disk_{metric}_total{{device=\"{device}\",op=\"{op}\"}}"));
    Disk {
        reads: of("requests", "read"),
        writes: of("requests", "write"),
        flushes: of("requests", "flush"),
        read_bytes: of("bytes", "read"),
        written_bytes: of("bytes", "write"),
        errors: sample.get(&format!("halyard_disk_errors_total{{device=\"{device}\"}}")),
        device,
    }
}

fn net(sample: &Sample, device: String) -> Net {
    let of = |metric: &str, direction: &str| {
        sample.get(&format!("halyard_net_{metric}_total{{device=\"{device}\",direction=\"{direction}\"}}"))
    };
    Net {
        rx_packets: of("packets", "rx"),
        tx_packets: of("packets", "tx"),
        rx_bytes: of("bytes", "rx"),
        tx_bytes: of("bytes", "tx"),
        rx_dropped: of("dropped_packets", "rx"),
        tx_dropped: of("dropped_packets", "tx"),
        device,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_become_rates_and_gauges_stay() {
        let before = Sample::parse("# HELP x\nx_total{vcpu=\"0\"} 10\nfell_total 9\ngauge 5\n");
        let now = Sample::parse("x_total{vcpu=\"0\"} 30\nfell_total 4\ngauge 7\nnew_total 2\nno number\n");
        let rates = now.rates(&before, Duration::from_secs(2));
        let of = |name| rates.get(name);
        assert_eq!([of("x_total{vcpu=\"0\"}"), of("fell_total"), of("gauge"), of("new_total")], [10.0, 2.0, 7.0, 1.0]);
    }

    #[test]
    fn labels_are_found_once_and_in_order() {
        let sample = Sample::parse(
            "x{vcpu=\"10\",a=\"b\"} 1\nx{vcpu=\"9\",a=\"b\"} 1\nx{vcpu=\"9\",a=\"c\"} 1\nxy{vcpu=\"7\"} 1\n",
        );
        assert_eq!(sample.labels("x", "vcpu"), ["9", "10"]);
    }
}
