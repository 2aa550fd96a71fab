//! Models in the store: what workers register, and which jobs a worker with a model gets.

use std::collections::BTreeMap;

use hypnos::job::{HeldModel, ModelCard, ModelDrawing, ModelPart, ModelRef, Scheduler};
use hypnos::store::{ClaimFilter, Error, QueuePlace};

use super::*;

on_each! {
    what_workers_register_is_listed_until_it_expires_or_they_end_it,
    a_model_that_is_registered_again_is_what_it_says_then,
    a_worker_gets_the_jobs_of_its_model_and_those_of_none,
    jobs_of_another_model_hold_up_nobody,
    a_sample_needs_the_model_of_its_training,
    a_job_without_a_worker_for_its_model_says_so,
    a_training_goes_to_a_worker_that_has_the_parts_it_takes,
    open_options_are_bound_under_the_lease_only,
    the_first_schema_s_jobs_are_anybody_s,
}

const MODEL_A: &str = "aaaa";
const MODEL_B: &str = "bbbb";

fn held(name: &str, sha256: &str) -> HeldModel {
    let card = ModelCard {
        name: name.into(),
        sha256: sha256.into(),
        family: "sd15".into(),
        resolution: 512,
        parts: Vec::new(),
        drawing: ModelDrawing { scheduler: Scheduler::Ddim, guidance: 7.5 },
        training: BTreeMap::new(),
        classes: None,
        rare_tokens: Some(["sks", "zwx"].map(str::to_owned).to_vec()),
    };
    HeldModel { card, words: "mug teapot".into(), memory_bytes: Some(24 << 30) }
}

/// A training of the model with this name, and of this hash if it is known.
fn training_of(tenant: TenantId, name: &str, sha256: Option<&str>) -> NewJob {
    let model = ModelRef { name: name.into(), sha256: sha256.map(Into::into) };
    let spec = TrainSpec::new("mug", TrainOptions::default(), 7).unwrap();
    let spec = TrainSpec { model: Some(model), ..spec };
    NewJob { spec: Spec::Train(Box::new(spec)), ..training(tenant) }
}

impl TestDatabase {
    async fn claim_with(&self, model: &HeldModel) -> Option<Job> {
        let filter = ClaimFilter { model: Some(&model.card), ..ClaimFilter::from(BOTH) };
        self.store.claim(Uuid::now_v7(), filter, LONG, LONG).await.unwrap().map(|claim| claim.job)
    }

    /// Names and devices of the models that are registered.
    async fn models(&self) -> Vec<(String, Vec<String>)> {
        let models = self.store.models().await.unwrap();
        let devices = |devices: Vec<hypnos::store::ModelDevice>| {
            devices.into_iter().map(|device| device.name).collect()
        };
        models.into_iter().map(|model| (model.card.name, devices(model.devices))).collect()
    }
}

async fn what_workers_register_is_listed_until_it_expires_or_they_end_it(db: TestDatabase) {
    assert_eq!(db.models().await, []);
    let [first, second, third] = [Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7()];
    let model = held("sd15", MODEL_A);
    assert!(!db.store.renew_model(first, LONG).await.unwrap(), "nothing to renew");
    db.store.register_model(first, "cuda:0", &model, LONG).await.unwrap();
    db.store.register_model(second, "cuda:1", &model, LONG).await.unwrap();
    db.store.register_model(third, "cpu", &held("miniature", MODEL_B), NONE).await.unwrap();
    let devices = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut models = db.models().await;
    models.sort();
    let wanted = [("miniature".into(), devices(&[])), ("sd15".into(), devices(&["cuda:0", "cuda:1"]))];
    assert_eq!(models, wanted, "the third registration is over, its model stays known");
    assert_eq!(db.store.model_words(MODEL_A).await.unwrap().as_deref(), Some("mug teapot"));
    assert_eq!(db.store.model_words("cccc").await.unwrap(), None);

    assert!(db.store.renew_model(first, NONE).await.unwrap());
    db.store.unregister_model(second).await.unwrap();
    db.store.unregister_model(second).await.unwrap();
    assert!(db.models().await.iter().all(|(_, devices)| devices.is_empty()));
    assert!(!db.store.renew_model(second, LONG).await.unwrap());
}

async fn a_model_that_is_registered_again_is_what_it_says_then(db: TestDatabase) {
    let worker = Uuid::now_v7();
    db.store.register_model(worker, "cpu", &held("old name", MODEL_A), LONG).await.unwrap();
    db.store.register_model(worker, "cpu", &held("new name", MODEL_A), LONG).await.unwrap();
    let models = db.store.models().await.unwrap();
    assert_eq!(models.len(), 1);
    assert_eq!((models[0].card.name.as_str(), models[0].devices.len()), ("new name", 1));
    assert_eq!(models[0].devices[0].memory_bytes, Some(24 << 30));
}

async fn a_worker_gets_the_jobs_of_its_model_and_those_of_none(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let of_b = db.accept(training_of(tenant, "b", Some(MODEL_B))).await;
    let by_name = db.accept(training_of(tenant, "a", None)).await;
    let of_a = db.accept(training_of(tenant, "a", Some(MODEL_A))).await;
    let of_any = db.accept(training(tenant)).await;
    assert_eq!(
        (of_b.model.as_deref(), by_name.model.as_deref(), of_any.model),
        (Some(MODEL_B), Some("a"), None)
    );
    let model = held("a", MODEL_A);
    for wanted in [by_name.id, of_a.id, of_any.id] {
        assert_eq!(db.claim_with(&model).await.map(|job| job.id), Some(wanted));
    }
    assert_eq!(db.claim_with(&model).await, None);
    assert_eq!(db.claim_with(&held("b", MODEL_B)).await.map(|job| job.id), Some(of_b.id));
}

async fn jobs_of_another_model_hold_up_nobody(db: TestDatabase) {
    let [busy, quiet] = [db.tenant("busy").await, db.tenant("quiet").await];
    for _ in 0..50 {
        db.accept(training_of(busy, "b", Some(MODEL_B))).await;
    }
    let job = db.accept(training_of(quiet, "a", Some(MODEL_A))).await;
    let place = db.store.queue_place(&job).await.unwrap().unwrap();
    assert_eq!(place.position, 0, "nobody with its model has anything before it");
    assert_eq!(db.claim_with(&held("a", MODEL_A)).await.map(|job| job.id), Some(job.id));
}

async fn a_sample_needs_the_model_of_its_training(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let job = db.accept(training_of(tenant, "a", Some(MODEL_A))).await;
    let claimed = db.claim_with(&held("a", MODEL_A)).await.unwrap();
    db.store
        .finish(claimed.lease(), &json!({ "bundle_sha256": MODEL_A }), &[object("weights")])
        .await
        .unwrap();
    let drawn = db.accept(sample(tenant, job.id)).await;
    assert_eq!(drawn.model.as_deref(), Some(MODEL_A));
    assert_eq!(db.claim_with(&held("b", MODEL_B)).await, None);
    assert_eq!(db.claim_with(&held("a", MODEL_A)).await.map(|job| job.id), Some(drawn.id));
}

async fn a_job_without_a_worker_for_its_model_says_so(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let jobs = [
        db.accept(training_of(tenant, "a", Some(MODEL_A))).await,
        db.accept(training_of(tenant, "a", None)).await,
        db.accept(training(tenant)).await,
        db.accept(training_of(tenant, "b", Some(MODEL_B))).await,
    ];
    let served = async || {
        let mut served = Vec::new();
        for job in &jobs {
            served.push(db.store.queue_place(job).await.unwrap().is_some_and(|place| place.served));
        }
        served
    };
    assert_eq!(served().await, [false; 4]);
    let worker = Uuid::now_v7();
    db.store.register_model(worker, "cpu", &held("a", MODEL_A), LONG).await.unwrap();
    assert_eq!(served().await, [true, true, true, false]);
    db.store.unregister_model(worker).await.unwrap();
    assert_eq!(served().await, [false; 4]);
    let place = db.store.queue_place(&jobs[0]).await.unwrap();
    assert_eq!(place, Some(QueuePlace { position: 0, served: false }));
}

/// One bundle as it is downloaded, and the same with all that HYPNOS takes, draw alike: they have one hash.
async fn a_training_goes_to_a_worker_that_has_the_parts_it_takes(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let plain = held("a", MODEL_A);
    let full = {
        let mut full = plain.clone();
        full.card.parts = ModelPart::ALL.to_vec();
        full
    };
    let [at_full, at_plain] = [Uuid::now_v7(), Uuid::now_v7()];
    db.store.register_model(at_full, "cuda:0", &full, LONG).await.unwrap();
    db.store.register_model(at_plain, "cuda:1", &plain, LONG).await.unwrap();
    let models = db.store.models().await.unwrap();
    assert_eq!(models[0].card.parts, ModelPart::ALL, "whichever worker came last");
    let lacks: Vec<_> = models[0].devices.iter().map(|device| device.lacks.as_slice()).collect();
    assert_eq!(lacks, [&[][..], ModelPart::ALL]);

    let accept = async |given: serde_json::Value| {
        let spec = TrainSpec::of_model(&models[0].card, "mug", &given, 7).unwrap();
        db.accept(NewJob { spec: Spec::Train(Box::new(spec)), ..training(tenant) }).await
    };
    let hypnos = accept(json!({})).await;
    let unscored = accept(json!({ "method": "dreambooth", "evaluation": { "enabled": false } })).await;
    let served = async || db.store.queue_place(&hypnos).await.unwrap().is_some_and(|place| place.served);
    assert!(served().await);
    assert_eq!(db.claim_with(&plain).await.map(|job| job.id), Some(unscored.id), "the first one is not its");
    assert_eq!(db.claim_with(&plain).await, None);
    db.store.unregister_model(at_full).await.unwrap();
    assert!(!served().await, "the worker that is left cannot train it");
    assert_eq!(db.claim_with(&full).await.map(|job| job.id), Some(hypnos.id));
}

async fn open_options_are_bound_under_the_lease_only(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let spec = TrainSpec::new("mug", TrainOptions::default(), 7).unwrap();
    let open = TrainSpec { open_options: Some(json!({})), ..spec };
    let job = db.accept(NewJob { spec: Spec::Train(Box::new(open.clone())), ..training(tenant) }).await;
    let mut model = held("a", MODEL_A);
    model.card.training.insert(
        "hypnos".into(),
        json!({ "steps": 300, "views": { "enabled": false },
        "loss_weights": { "perceptual": 0.0 } }),
    );
    let claimed = db.claim_with(&model).await.unwrap();
    let resolved = open.resolved(&model.card).unwrap().expect("options were open");
    assert_eq!((resolved.options.steps, resolved.open_options.clone()), (300, None));
    for _ in 0..2 {
        db.store.bind_model(claimed.lease(), &resolved).await.unwrap();
    }
    let bound = db.train(tenant, job.id).await.unwrap();
    assert_eq!(bound.spec().unwrap(), Spec::Train(Box::new(resolved.clone())));
    assert_eq!(bound.model.as_deref(), Some(MODEL_A));
    assert!(bound.version > claimed.version, "a client sees the change");
    db.store.release(claimed.lease()).await.unwrap();
    let late = db.store.bind_model(claimed.lease(), &open).await;
    assert!(matches!(late, Err(Error::LeaseLost)), "{late:?}");
    assert_eq!(db.claim_with(&held("b", MODEL_B)).await, None, "it goes on where it began");
}

async fn the_first_schema_s_jobs_are_anybody_s(db: TestDatabase) {
    db.back_to_the_first_schema().await;
    let spec = json!({ "kind": "train", "class_name": "mug", "seed": 7,
        "options": TrainOptions::default() });
    db.sql(&format!(
        "insert into job (id, tenant, kind, class_name, spec, photos, priority, max_attempts, not_before_ms, created_ms) \
         values ('{}', '{}', 'train', 'mug', '{spec}', '[]', 0, 3, 0, 0)",
        JobId::new(), TenantId::LOCAL
    ))
    .await;
    db.store.migrate().await.unwrap();
    let claimed = db.claim_with(&held("a", MODEL_A)).await.unwrap();
    let Ok(Spec::Train(spec)) = claimed.spec() else { panic!("a training") };
    assert_eq!((spec.resolved(&held("a", MODEL_A).card), spec.model), (Ok(None), None), "its options stay");
}
