//! The benchmark `torch_eager` as a person runs it, and its unit tests: a bench target has no test harness, so its
//! `#[test]` functions run here. What it measures is never tested, only that it measures and says so.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use serde_json::Value;

#[path = "../../benches/torch_eager/bench.rs"]
mod torch_eager;

/// What the benchmark would have left as a process.
struct Output {
    code: ExitCode,
    stdout: String,
    stderr: String,
}

fn bench(args: &[&str]) -> Output {
    let args = ["torch_eager", "--bench"].iter().chain(args).map(OsString::from); // as cargo starts it
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let code = torch_eager::main(args, &mut stdout, &mut stderr);
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Output { code, stdout: text(stdout), stderr: text(stderr) }
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).expect("a file")).expect("JSON")
}

/// The three numbers of one cell.
fn spread(cell: &str) -> Vec<f64> {
    cell.split('/').map(|number| number.trim().parse().expect("a number")).collect()
}

#[test]
fn a_small_operation_is_measured_without_python() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("bench.json");
    let out = bench(&["--only", "linear-77", "--repeats", "1", "--json", &file.to_string_lossy()]);
    assert_eq!((out.code, out.stderr.as_str()), (ExitCode::SUCCESS, ""));
    let table = out.stdout;
    for name in ["linear-77x768-320/fwd", "linear-77x768-320/fwd+bwd"] {
        let start = format!("| {name} | 1x77x768 * 320x768 | ");
        let row =
            table.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("{table}"));
        let times = spread(row.split('|').next().expect("a cell"));
        assert!(times.len() == 3 && times[0] > 0.0 && times[0] <= times[2], "{row}");
    }
    let cases = json(&file)["cases"].as_array().expect("cases").clone();
    let measured = cases.iter().filter(|case| case["ours_s"][0].as_f64().is_some_and(|s| s > 0.0));
    assert_eq!((cases.len(), measured.count()), (2, 2));
}

#[test]
fn a_name_that_no_case_has_is_refused() {
    let out = bench(&["--only", "transistor"]);
    assert_eq!(out.code, ExitCode::from(2));
    let error = out.stderr;
    assert!(error.contains("--only transistor") && error.lines().count() == 1, "{error}");
}

/// A program in PyTorch's place whose answers are known, for the order of the questions and the sums after them.
#[cfg(unix)]
fn stand_in(dir: &Path, script: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let file = dir.join("python");
    std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("a script");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("permissions");
    file.to_string_lossy().into_owned()
}

#[cfg(unix)]
#[test]
fn pytorch_is_asked_as_often_as_we_are_and_the_ratio_is_ours_over_its() {
    let dir = tempfile::tempdir().expect("a directory");
    let (asked, file) = (dir.path().join("asked"), dir.path().join("bench.json"));
    // Called as `python -c PROGRAM THREADS`.
    let script = format!(
        r#"echo "{{\"torch\": \"9.9\", \"threads\": $3}}"
while read -r word rest; do
    echo "$word" >> {}
    case $word in run) echo '{{"seconds": 10}}' ;; *) echo '{{}}' ;; esac
done"#,
        asked.display()
    );
    let python = stand_in(dir.path(), &script);
    let json_file = file.to_string_lossy();
    let args =
        ["--python", &python, "--only", "linear-77x768-320/fwd+", "--repeats", "3", "--json", &json_file];
    let out = bench(&args);
    assert_eq!((out.code, out.stderr.as_str()), (ExitCode::SUCCESS, ""));
    let words = std::fs::read_to_string(asked).expect("what was asked");
    assert_eq!(words.split_whitespace().collect::<Vec<_>>(), ["setup", "run", "run", "run", "run", "drop"]);
    let entry = &json(&file)["cases"][0];
    assert_eq!(entry["torch_s"], serde_json::json!([10.0, 10.0, 10.0]));
    let mut ours: Vec<f64> =
        entry["ours_s"].as_array().expect("ours").iter().filter_map(Value::as_f64).collect();
    ours.sort_by(f64::total_cmp);
    let (ratio, paired) = (entry["ratio"].as_f64(), entry["paired"].as_f64());
    assert!((ratio.expect("a ratio") - ours[1] / 10.0).abs() < 1e-12 && ratio == paired, "{entry}");
    assert!(out.stdout.contains("torch 9.9"));
}

#[cfg(unix)]
#[test]
fn a_python_without_pytorch_is_named_in_one_line() {
    let dir = tempfile::tempdir().expect("a directory");
    for (script, wanted) in [
        ("echo '{\"error\": \"No module named torch\"}'", "torch: start: No module named torch"),
        ("exit 3", "torch: it ended at start (exit status: 3)"),
        ("echo hello", "torch: start was answered with \"hello\""),
        ("echo '{\"threads\": 0}'", "threads, got Some(0)"),
    ] {
        let python = stand_in(dir.path(), script);
        let out = bench(&["--python", &python, "--only", "linear-77"]);
        assert_eq!(out.code, ExitCode::from(2));
        let error = out.stderr;
        assert!(error.contains(wanted) && error.lines().count() == 1, "{error}");
    }
    let error = bench(&["--python", "/no/such/python", "--only", "linear-77"]).stderr;
    assert!(error.contains("--python /no/such/python: "), "{error}");
}
