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
