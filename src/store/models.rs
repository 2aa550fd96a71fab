//! Models: what the workers hold, and which of them was ever registered.

use std::time::Duration;

use uuid::Uuid;

use super::db::{Row, args};
use super::error::Result;
use super::fair_queue::lacks;
use super::handle::Store;
use super::json::{json, parse};
use crate::job::{HeldModel, ModelCard, ModelPart};

/// A model that a worker has registered.
#[derive(Clone, Debug, PartialEq)]
pub struct RegisteredModel {
    /// What it can do: as it was registered last, with all parts that any worker so far had.
    pub card: ModelCard,
    /// When a worker registered it last, in milliseconds since 1970.
    pub registered_ms: i64,
    /// The devices of running workers that hold it.
    pub devices: Vec<ModelDevice>,
}

/// A device that holds a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelDevice {
    /// `cpu`, `cuda` or `cuda:N`.
    pub name: String,
    /// Its own memory in bytes; none if it is the machine's.
    pub memory_bytes: Option<i64>,
    /// The optional parts of the model that its worker does not have.
    pub lacks: Vec<ModelPart>,
}

impl Store {
    /// Registers that a worker holds a model on a device, for `time` from now on.
    pub async fn register_model(
        &self,
        worker: Uuid,
        device: &str,
        model: &HeldModel,
        time: Duration,
    ) -> Result<()> {
        let insert_model = "insert into model (sha256, name, card, words, parts, registered_ms) \
                            select $1, $2, $3, $4, $5, ms from clock where true \
                            on conflict (sha256) do update set name = excluded.name, card = excluded.card, \
                            words = excluded.words, parts = model.parts | excluded.parts, \
                            registered_ms = excluded.registered_ms";
        let insert_worker = "insert into model_worker (worker, model, device, memory_bytes, lacks, until_ms) \
                             select $1, $2, $3, $4, $5, ms + $6 from clock where true \
                             on conflict (worker) do update set model = excluded.model, device = excluded.device, \
                             memory_bytes = excluded.memory_bytes, lacks = excluded.lacks, \
                             until_ms = excluded.until_ms";
        let HeldModel { card, words, memory_bytes } = model;
        let mut tx = self.db.begin().await?;
        let parts = ModelPart::mask(&card.parts);
        let values = args![card.sha256.as_str(), card.name.as_str(), json(card), words.as_str(), parts];
        tx.run(insert_model, values).await?;
        let memory_bytes = memory_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
        let values = args![worker.to_string(), card.sha256.as_str(), device, memory_bytes, lacks(card), time];
        tx.run(insert_worker, values).await?;
        tx.run("delete from model_worker where until_ms <= (select ms from clock)", &[]).await?;
        tx.commit().await
    }

    /// Renews a registration for `time` from now on; false if there is none any more.
    pub async fn renew_model(&self, worker: Uuid, time: Duration) -> Result<bool> {
        let update = "update model_worker set until_ms = (select ms from clock) + $2 where worker = $1";
        Ok(self.db.write(update, args![worker.to_string(), time]).await? > 0)
    }

    /// Ends a registration. The model stays known.
    pub async fn unregister_model(&self, worker: Uuid) -> Result<()> {
        let delete = "delete from model_worker where worker = $1";
        self.db.write(delete, args![worker.to_string()]).await.map(drop)
    }

    /// All models that were ever registered, the last registered first.
    pub async fn models(&self) -> Result<Vec<RegisteredModel>> {
        let select = "select sha256, card, parts, registered_ms, device, memory_bytes, lacks from model \
                      left join (select * from model_worker where until_ms > (select ms from clock)) running \
                      on running.model = model.sha256 order by registered_ms desc, sha256, device, worker";
        let mut models: Vec<RegisteredModel> = Vec::new();
        for row in self.db.read(select, &[]).await? {
            let device = row.text_or_none("device")?.map(|name| device(&row, name)).transpose()?;
            match models.last_mut() {
                Some(last) if last.card.sha256 == row.text("sha256")? => last.devices.extend(device),
                _ => models.push(RegisteredModel {
                    card: card(&row)?,
                    registered_ms: row.int("registered_ms")?,
                    devices: device.into_iter().collect(),
                }),
            }
        }
        Ok(models)
    }

    /// The words that are one token each of a model's vocabulary, with spaces between them.
    pub async fn model_words(&self, sha256: &str) -> Result<Option<String>> {
        let row = self.db.row("select words from model where sha256 = $1", args![sha256]).await?;
        row.map(|row| row.text("words").map(ToOwned::to_owned)).transpose()
    }
}

fn card(row: &Row) -> Result<ModelCard> {
    let card: ModelCard = parse("card", row.text("card")?)?;
    let parts = ModelPart::of_mask(ModelPart::mask(&card.parts) | row.int("parts")?);
    Ok(ModelCard { parts, ..card })
}

fn device(row: &Row, name: &str) -> Result<ModelDevice> {
    Ok(ModelDevice {
        name: name.to_owned(),
        memory_bytes: row.int_or_none("memory_bytes")?,
        lacks: ModelPart::of_mask(row.int("lacks")?),
    })
}
