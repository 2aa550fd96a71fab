//! The demo's products: `examples/products`, embedded in the program.

use include_dir::{Dir, include_dir};
use serde::Deserialize;

static FILES: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/examples/products");

/// The default product.
pub(super) const FIRST: &str = "dotted-teapot";

/// A product and its photos.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Product {
    /// Its name.
    pub(super) name: String,
    /// Its class name.
    pub(super) class_name: String,
    /// Its place in the photos, as prompts say it.
    pub(super) place: String,
    /// Its photos, JPEG files.
    #[serde(skip)]
    pub(super) photos: Vec<Vec<u8>>,
}

/// All products, with their photos.
pub(super) fn all() -> Vec<Product> {
    let list = FILES.get_file("products.json").expect("the list is there");
    let mut products: Vec<Product> = serde_json::from_slice(list.contents()).expect("the list is sound");
    for product in &mut products {
        let dir = FILES.get_dir(&product.name).expect("a directory for each product");
        let mut files: Vec<_> = dir.files().collect();
        files.sort_by_key(|file| file.path());
        product.photos = files.iter().map(|file| file.contents().to_vec()).collect();
    }
    products
}

/// The product of that name; an error that lists all otherwise.
pub(super) fn find(name: &str) -> Result<Product, String> {
    let all = all();
    let names: Vec<_> = all.iter().map(|product| product.name.clone()).collect();
    let found = all.into_iter().find(|product| product.name == name);
    found.ok_or_else(|| format!("--product: wanted one of {}, got {name:?}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::photo::{Limits, decode};

    #[test]
    fn a_dozen_products_have_four_good_photos_each() {
        let all = all();
        assert_eq!(all.len(), 12);
        for product in &all {
            assert_eq!(product.photos.len(), 4, "{}", product.name);
            for photo in &product.photos {
                let photo = decode(photo, &Limits::default()).unwrap();
                assert!(
                    photo.inspection.warnings.is_empty(),
                    "{}: {:?}",
                    product.name,
                    photo.inspection.warnings
                );
            }
        }
        assert!(find(FIRST).is_ok());
        assert!(find("nothing").unwrap_err().contains("banded-robot"));
    }
}
