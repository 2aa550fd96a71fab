//! The README's table of settings matches the command line.

use clap::{Arg, ArgAction, Command};

/// Every setting, in the order of the command line: its variable, its flag, its default, its meaning, and which of the
/// two programs take it.
fn table() -> String {
    let command = hypnos::cli::command();
    let of = |name: &str| -> Vec<Arg> {
        let command: &Command = command.find_subcommand(name).expect("a subcommand");
        command.get_arguments().filter(|arg| arg.get_env().is_some()).cloned().collect()
    };
    let (serve, work) = (of("serve"), of("work"));
    let mut rows =
        vec!["| variable | flag | default | meaning | for |".to_owned(), "|---|---|---|---|---|".into()];
    let also = |others: &[Arg], arg: &Arg| others.iter().any(|other| other.get_env() == arg.get_env());
    for arg in &serve {
        rows.push(row(arg, if also(&work, arg) { "both" } else { "serve" }));
    }
    rows.extend(work.iter().filter(|arg| !also(&serve, arg)).map(|arg| row(arg, "work")));
    rows.join("\n")
}

fn row(arg: &Arg, whom: &str) -> String {
    let variable = arg.get_env().expect("asked for").to_string_lossy();
    let flag = arg.get_long().expect("every setting has a flag");
    let values: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    let default = match (arg.get_action(), values.join(",")) {
        (ArgAction::SetTrue, _) => "off".to_owned(),
        (_, values) if values.is_empty() => String::new(),
        (_, values) => format!("`{values}`"),
    };
    let meaning = arg.get_help().map(ToString::to_string).unwrap_or_default();
    format!("| `{variable}` | `--{flag}` | {default} | {meaning} | {whom} |")
}

#[test]
fn the_readme_s_table_of_settings_matches_the_command_line() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    assert!(readme.contains(&table()), "README.md wants this table under `Settings`:\n\n{}\n", table());
}
