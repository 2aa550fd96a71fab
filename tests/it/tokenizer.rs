//! The tokenizer against the ids of the reference, `tests/golden/make.py`.

use std::path::{Path, PathBuf};

use hypnos::ml::tokenizer::Tokenizer;
use serde_json::Value;

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn lines(path: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(at(path)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Compares all texts, and shows the first few that differ.
fn hold(tokenizer: &Tokenizer, wanted: impl Iterator<Item = (String, Vec<u32>)>, pad: u32) -> usize {
    let mut n = 0;
    let mut wrong = Vec::new();
    for (text, mut want) in wanted {
        want.resize(77, pad);
        let got = tokenizer.encode(&text);
        if got != want {
            wrong.push(format!("{text:?}\n  want {want:?}\n  got  {got:?}"));
        }
        n += 1;
    }
    assert!(
        wrong.is_empty(),
        "{} of {n} texts differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(10)].join("\n")
    );
    n
}

#[test]
fn every_text_has_the_ids_of_the_reference() {
    let tokenizer = Tokenizer::open(&at("tests/bundle/tokenizer")).unwrap();
    let rows = lines("tests/golden/tokenizer.jsonl");
    let wanted = rows.iter().map(|row| (row["text"].as_str().unwrap().to_owned(), ids(&row["ids"])));
    assert!(hold(&tokenizer, wanted, 901) >= 2200);
}

#[test]
fn stable_diffusion_2_fills_up_with_exclamation_marks() {
    let (dir, rows) = (tempfile::tempdir().unwrap(), lines("tests/golden/tokenizer_sd2.jsonl"));
    for name in ["vocab.json", "merges.txt"] {
        std::fs::copy(at("tests/bundle/tokenizer").join(name), dir.path().join(name)).unwrap();
    }
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::write(dir.path().join(name), rows[0][name].to_string()).unwrap();
    }
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("")[2..], [0; 75]);
    let wanted = rows[1..].iter().map(|row| (row["text"].as_str().unwrap().to_owned(), ids(&row["ids"])));
    assert!(hold(&tokenizer, wanted, 0) >= 200);
}

#[test]
fn a_wider_vocabulary_gives_the_ids_of_the_reference() {
    let tokenizer = Tokenizer::open(&at("tests/golden/tokenizer_wide")).unwrap();
    let rows = lines("tests/golden/tokenizer.jsonl");
    let wide = lines("tests/golden/tokenizer_wide/ids.jsonl");
    assert_eq!(rows.len(), wide.len());
    let wanted =
        rows.iter().zip(&wide).map(|(row, want)| (row["text"].as_str().unwrap().to_owned(), ids(want)));
    let end = tokenizer.encode("")[1];
    hold(&tokenizer, wanted, end);
}

#[test]
fn the_token_count_says_what_will_be_cut_off() {
    let tokenizer = Tokenizer::open(&at("tests/bundle/tokenizer")).unwrap();
    assert_eq!(tokenizer.count(""), 0);
    let long = "x".repeat(100);
    assert_eq!(tokenizer.count(&long), 100);
    let encoded = tokenizer.encode(&long);
    assert_eq!((encoded.len(), encoded[76]), (77, 901), "the end stays when a text is cut");
}

#[test]
fn rare_tokens_are_single_and_other_words_are_not() {
    let tokenizer = Tokenizer::open(&at("tests/bundle/tokenizer")).unwrap();
    for word in ["sks", "zwx", "ohwx", "xjy", "qvk", "olis"] {
        assert!(tokenizer.is_single_token(word), "{word}");
    }
    for word in ["", "sksks", "zwx sks", "<|endoftext|>", "thunderstorm"] {
        assert!(!tokenizer.is_single_token(word), "{word}");
    }
}

#[test]
fn what_stands_for_unknown_symbols_is_no_word() {
    let dir = with("special_tokens_map.json", r#"{"unk_token": "!"}"#);
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("!")[1], 0, "a token of the vocabulary");
    assert_eq!(tokenizer.id("!"), None);
}

#[test]
fn a_placeholder_of_textual_inversion_is_one_token() {
    let dir = with("added_tokens.json", r#"{"<my-jar>": 902, "<my-jar>_1": 903}"#);
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 904);
    let ids = tokenizer.encode("a <my-jar> on <My-Jar>_1");
    assert_eq!(tokenizer.id("<my-jar>"), Some(902));
    assert!(tokenizer.is_added(902) && !tokenizer.is_added(320));
    assert_eq!(ids[1..3], [320, 902]);
    assert!(ids.contains(&903), "{ids:?}");
    let plain = Tokenizer::open(&at("tests/bundle/tokenizer")).unwrap();
    assert_eq!((plain.vocab_size(), plain.id("<my-jar>")), (902, None));
}

/// A copy of the miniature's tokenizer with one file changed.
fn with(file: &str, text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(at("tests/bundle/tokenizer").join(name), dir.path().join(name)).unwrap();
    }
    std::fs::write(dir.path().join(file), text).unwrap();
    dir
}

#[test]
fn padding_is_the_token_that_the_files_name() {
    let dir = with("special_tokens_map.json", r#"{"pad_token": "!"}"#);
    assert_eq!(Tokenizer::open(dir.path()).unwrap().encode("a")[..4], [900, 320, 901, 0]);
}

#[test]
fn a_broken_file_is_named_with_its_line() {
    let message = |file, text| Tokenizer::open(with(file, text).path()).unwrap_err().to_string();
    assert!(
        message("merges.txt", "#version: 0.2\no f</w>\nthree of them\n")
            .ends_with("two symbols are wanted, got `three of them`")
    );
    assert!(message("merges.txt", "#version: 0.2\nzz qq\n").contains("zz"), "a merge of unknown symbols");
    assert!(
        message("vocab.json", "{\"a\": -1}").contains("vocab.json: is not a JSON object of token numbers")
    );
    assert!(
        message("vocab.json", "{\"a\": 1}")
            .contains("the vocabulary has no `<|startoftext|>`, the bos_token")
    );
    assert!(
        message("special_tokens_map.json", "[1]").contains("special_tokens_map.json: is not a JSON object")
    );
    assert!(message("tokenizer_config.json", r#"{"model_max_length": 1}"#).contains("at least 3 is wanted"));
}
