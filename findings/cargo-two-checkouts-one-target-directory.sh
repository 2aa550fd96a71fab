#!/usr/bin/env bash
# Two checkouts of one package that share CARGO_TARGET_DIR: cargo takes the programs of the one for those of the other.
#
# Seen with cargo 1.95.0 (f2d3ce0bd 2026-03-21). Since a package's place counts relative to its workspace, both
# checkouts have the same file names in the target directory, and a program is fresh if it is newer than the sources. So
# in a checkout whose files are older than the last build in the other, `cargo run` and `cargo test` build nothing, say
# nothing, and run what was built from the other's sources: a worktree's tests can pass without its code being compiled.
# Output seen: "built from a" four times, for runs in a, b, a and b.
#
# What helps: a target directory for each checkout, `cargo clean --package NAME` before, or another profile.
# Fails if cargo behaves otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for checkout in a b; do
    mkdir -p "$work/$checkout/src"
    printf '[package]\nname = "mixed"\nversion = "0.1.0"\nedition = "2024"\n' >"$work/$checkout/Cargo.toml"
    printf 'fn main() {\n    println!("built from %s");\n}\n' "$checkout" >"$work/$checkout/src/main.rs"
done
export CARGO_TARGET_DIR=$work/target
cargo --version
said=$(for checkout in a b a b; do (cd "$work/$checkout" && cargo run --quiet --offline); done)
echo "$said"
[ "$said" = "$(printf 'built from a\n%.0s' 1 2 3 4)" ] || { echo "cargo behaves otherwise now" >&2; exit 1; }
