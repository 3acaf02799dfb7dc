//! Long stories of kernels, for `make soak`: each that Debian ships, and where a hundred boots put one.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use halyard_tests::kaslr::{Place, Room, Spread};
use halyard_tests::kernels::Lie;
use halyard_tests::story::{Story, ask, boot, power_off};
use halyard_tests::{Host, Kernel, Lent, VmSpec};

/// Boots with a kernel that the monitor places, and with one that places itself.
const BOOTS: usize = 100;
const OWN_BOOTS: usize = 40;

#[test]
fn soak_every_kernel_of_debian_is_unpacked_on_the_host() -> Result<()> {
    let story = Story::begin("kernels");
    let host = &Lent::take()?;
    let mut told = Vec::new();
    for kernel in Kernel::ALL {
        let folder = host.folder()?;
        let (trace, cache) = (format!("{folder}/boot.json"), format!("{folder}/kernels"));
        let spec = VmSpec::guest(kernel)?.memory("1G").args(["--boot-trace", &trace, "--kernel-cache", &cache]);
        let began = Instant::now();
        let vm = boot(host, &spec).with_context(|| kernel.label())?;
        let time = began.elapsed().as_secs_f64();
        let release = ask(&vm, "uname -r")?;
        assert_eq!(release, kernel.version()?);
        Room::new(kernel, 1 << 30)?.check(Place::of(&vm)?)?;
        power_off(&vm)?;
        let log = vm.process().error_output();
        for word in ["unpacks itself", "not placed at random", "not kept", "WARN", "ERROR"] {
            ensure!(!log.contains(word), "{release}: {log}");
        }
        let report: serde_json::Value = serde_json::from_slice(&host.read_file(&trace)?)?;
        let steps = report["milestones"].as_array().context("milestones")?;
        let unpacked = steps.iter().find(|step| step["name"] == "kernel-decompressed");
        let unpacked = unpacked.and_then(|step| step["at_us"].as_f64()).with_context(|| format!("{report:#}"))?;
        host.run(format!("rm -r {folder}"))?.ok()?;
        println!("soak: {release}: unpacked after {:.1} s, user space after {time:.1} s", unpacked / 1e6);
        told.push(release);
    }
    story.tell(&format!("{} kernels, each unpacked on the host: {}", told.len(), told.join(", ")));
    Ok(())
}

/// Where many boots put a kernel.
fn places(host: &Host, spec: &VmSpec, boots: usize, room: &Room) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for number in 0..boots {
        let vm = boot(host, spec).with_context(|| format!("boot {number} of {boots}"))?;
        let place = Place::of(&vm)?;
        room.check(place).with_context(|| format!("boot {number} of {boots}"))?;
        places.push(place);
        power_off(&vm)?;
    }
    Ok(places)
}

fn words(spread: &Spread) -> String {
    let Spread { draws, of, distinct, least, most, distance } = spread;
    format!("{distinct} different of {draws} in {of}, {least} to {most}, distance {distance:.3}")
}

#[test]
fn soak_a_hundred_boots_spread_a_kernel_as_its_own_decompressor_does() -> Result<()> {
    let story = Story::begin("places");
    let host = &Lent::take()?;
    let kernel = Kernel::Debian6_12Cloud;
    let spec = VmSpec::guest(kernel)?.memory("1G");
    let room = Room::new(kernel, 1 << 30)?;
    let ours = places(host, &spec, BOOTS, &room)?;
    let own = places(host, &spec.kernel_file(&kernel.bzimage_with(Lie::NoPayload)?), OWN_BOOTS, &room)?;
    let (virt, physical) = (room.spread_of_virtual(&ours), room.spread_of_physical(&ours));
    let (own_virt, own_physical) = (room.spread_of_virtual(&own), room.spread_of_physical(&own));
    println!("soak: placed by Halyard: virtual {}; physical {}", words(&virt), words(&physical));
    println!("soak: by the kernel itself: virtual {}; physical {}", words(&own_virt), words(&own_physical));
    // The kernel's own decompressor keeps the physical memory free that it lies in itself, so that it is not uniform over
    // all of the room.
    for spread in [virt, physical, own_virt] {
        spread.check_uniform()?;
    }
    story.tell(&format!("{BOOTS} boots and {OWN_BOOTS} of a kernel that unpacks itself, each spread as uniform draws"));
    Ok(())
}
