//! Every test that the table of bad inputs names exists.

use std::fs;
use std::path::Path;

fn functions(dir: &Path, found: &mut String) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            functions(&entry.path(), found);
        } else {
            found.push_str(&fs::read_to_string(entry.path()).unwrap());
        }
    }
}

#[test]
fn every_test_that_the_table_of_cases_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = fs::read_to_string(root.join("tests/CASES.md")).unwrap();
    let mut sources = String::new();
    functions(&root.join("tests/it"), &mut sources);
    functions(&root.join("src"), &mut sources); // what lies inside is tested there
    let named: Vec<&str> = table.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
    let tests = named.iter().filter_map(|name| name.rsplit("::").next());
    let tests = tests.filter(|name| !name.contains(' ') && *name != "*");
    let missing: Vec<&str> = tests
        .filter(|name| {
            !sources.contains(&format!("fn {name}(")) && !sources.contains(&format!("    {name},"))
        })
        .collect();
    assert!(named.len() > 80, "{} names", named.len());
    assert!(missing.is_empty(), "{missing:?}");
    for case in 1..=60 {
        let row = table.lines().any(|line| {
            let cell = line.trim_start_matches("| ").split('|').next().unwrap_or_default();
            cell.split(',').any(|number| match number.trim().split_once('-') {
                Some((from, to)) => {
                    from.parse().is_ok_and(|from: u32| (from..=to.parse().unwrap_or(0)).contains(&case))
                }
                None => number.trim().parse() == Ok(case),
            })
        });
        assert!(row, "case {case} has no row");
    }
}
