//! Devices by name.

use hypnos::ml::device::{open, ordinal};

#[test]
fn the_cpu_is_always_there() {
    assert!(open("cpu").unwrap().is_cpu());
}

#[test]
fn a_name_that_is_no_device_is_refused_in_one_line() {
    for name in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "cpu:0", "cpu:"] {
        let message = open(name).unwrap_err().to_string();
        assert!(message.starts_with("device: wanted cpu, cuda or cuda:N, got "), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
}

#[test]
fn names_are_told_apart_by_the_number_of_the_gpu() {
    let of = |name: &str| ordinal(name).unwrap();
    assert_eq!(["cpu", "cuda", "cuda:0", "cuda:12"].map(of), [None, Some(0), Some(0), Some(12)]);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_the_feature_cuda_is_refused_with_the_reason() {
    let message = open("cuda:1").unwrap_err().to_string();
    assert_eq!(message, "device cuda:1: this program was built without CUDA; build it with --features cuda");
}

/// Runs only where the software device takes a GPU's place: its driver says whatever version it is told.
#[cfg(feature = "cuda")]
#[test]
fn a_driver_that_is_too_old_is_refused_in_one_line() {
    const OLD: &str = "SOFTWARE_CUDA_DRIVER";
    if std::env::var_os("SOFTWARE_CUDA").is_none() {
        return;
    }
    if std::env::var_os(OLD).is_some() {
        let message = open("cuda:0").unwrap_err().to_string();
        let wanted = "device cuda:0: the NVIDIA driver is too old: it is for CUDA 12.8, this program was built with CUDA \
                      13.0; wanted 580 or newer";
        return assert_eq!(message, wanted);
    }
    let this = std::env::current_exe().unwrap();
    let name = "device::a_driver_that_is_too_old_is_refused_in_one_line";
    let run = std::process::Command::new(this).args(["--exact", name]).env(OLD, "12080").output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && text.contains("1 passed"), "{text}");
}

/// The driver reads which devices it may show once per process, so the test runs itself again where it may show none.
#[cfg(feature = "cuda")]
#[test]
fn a_machine_without_a_gpu_says_no_cuda_device() {
    const NONE: (&str, &str) = ("CUDA_VISIBLE_DEVICES", "");
    if std::env::var_os(NONE.0).is_some_and(|shown| shown == NONE.1) {
        for name in ["cuda", "cuda:3"] {
            let message = open(name).unwrap_err().to_string();
            assert!(message.starts_with(&format!("device {name}: no CUDA device")), "{message}");
            assert_eq!(message.lines().count(), 1);
        }
        return;
    }
    let this = std::env::current_exe().unwrap();
    let name = "device::a_machine_without_a_gpu_says_no_cuda_device";
    let run = std::process::Command::new(this).args(["--exact", name]).env(NONE.0, NONE.1).output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && text.contains("1 passed"), "{text}");
}
