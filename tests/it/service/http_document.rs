//! The OpenAPI document: committed as it is generated, and what is true of every operation in it.

#[test]
fn the_committed_document_is_the_generated_one() {
    let committed = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi/hypnos.json"));
    std::fs::create_dir_all("openapi").unwrap();
    std::fs::write("openapi/hypnos.json", hypnos::http::openapi()).unwrap();
    let same = committed.is_ok_and(|text| text == hypnos::http::openapi());
    assert!(same, "the API has changed; look at it, then: hypnos openapi > openapi/hypnos.json");
}
