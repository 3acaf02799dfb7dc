//! Devices that are stopped, saved and restored.

use super::*;

#[test]
fn a_saved_device_goes_on_in_another() {
    for features in [0, EVENT_IDX] {
        let (_, mut old, mut queue) = running(features | FEATURE);
        old.write(old.config, b"C");
        send(&mut old, &mut queue, b"first");
        send(&mut old, &mut queue, b"second");
        old.wait_used(0, &mut queue);
        assert!(old.device.save(&mut Sections::default()).is_err(), "only while suspended");
        old.device.suspend();
        let answer = send(&mut old, &mut queue, b"third");
        let mut saved = Sections::default();
        old.device.save(&mut saved).unwrap();

        let (seen, echo) = Echo::new();
        let mut new = PciDriver::with_memory(echo, old.memory.clone());
        new.device.restore(&mut saved).unwrap();
        new.segment.refresh();
        new.device.resume();
        new.device.resumed(Resumed::Migrated);
        assert_eq!(*seen.resumed.lock().unwrap(), [Resumed::Migrated]);
        new.find_structures();
        assert_eq!(new.status(), 15);
        assert_eq!(new.read::<6>(new.config), *b"Config");
        assert!(new.wait_vector(1), "the driver is told in case an interrupt was lost");
        assert_eq!(new.wait_used(0, &mut queue).len, 6, "drained at the suspension");
        new.alloc(0x10000);
        send(&mut new, &mut queue, b"fourth");
        assert_eq!(new.wait_used(0, &mut queue).len, 5);
        assert_eq!(new.bytes(answer, 5), b"third");
        assert_eq!(new.device.faults(), 0);
    }
}

#[test]
fn suspending_and_resuming_loses_nothing() {
    let (_, mut driver, mut queue) = running(EVENT_IDX);
    let mut sent = 0;
    let mut returned = 0;
    for _ in 0..50 {
        send(&mut driver, &mut queue, b"x");
        driver.device.suspend();
        send(&mut driver, &mut queue, b"x");
        sent += 2;
        driver.device.resume();
        while returned + 1 < sent {
            driver.wait_used(0, &mut queue);
            returned += 1;
        }
    }
    assert_eq!(driver.device.faults(), 0);
}

#[test]
fn a_damaged_state_is_refused() {
    let (_, mut old, _queue) = running(FEATURE);
    old.alloc(16);
    old.device.suspend();
    let mut saved = Sections::default();
    old.device.save(&mut saved).unwrap();
    let damages = [
        ("virtio", "\"size\":16", "\"size\":17"),
        ("virtio", "\"size\":16", "\"size\":128"),
        ("virtio", "\"queues\":[", "\"queues\":[[],"),
        ("virtio", "\"status\":15", "\"status\":15,\"more\":1"),
        ("virtio", "\"descriptors\":65", "\"descriptors\":99999999"),
        ("virtio", "\"driver_features\":", "\"driver_features\":1"),
        ("virtio-pci", "\"entries\":[{", "\"entries\":[{\"address\":0,\"data\":0,\"control\":1},{"),
    ];
    for (section, from, to) in damages {
        let (version, data) = saved.0.get(section).unwrap().clone();
        let text = String::from_utf8(data).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        let damaged = text.replacen(from, to, 1).into_bytes();
        let mut copy = saved.clone();
        copy.0.insert(section.into(), (version, damaged));
        let (_, echo) = Echo::new();
        let new = PciDriver::with_memory(echo, old.memory.clone());
        assert!(matches!(new.device.restore(&mut copy), Err(Error::State(_))), "{to}");
    }
    let (_, new) = driver();
    assert!(new.device.restore(&mut Sections::default()).is_err());
    let mut newer = saved.clone();
    newer.0.get_mut("virtio").unwrap().0 = 2;
    assert!(new.device.restore(&mut newer).is_err());
}
