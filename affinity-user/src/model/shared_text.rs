//! Texts that many objects have in common, kept once: namespaces, nodes, the names of ports.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

/// How many texts there are at least before those that nobody has any more are looked for.
const LOOK: usize = 4096;

struct Texts {
    known: HashSet<Arc<str>>,
    /// How many there are when those that nobody has any more are looked for.
    look_at: usize,
}

static TEXTS: Mutex<Option<Texts>> = Mutex::new(None);

/// The text, shared with whoever else has it.
pub fn shared(text: &str) -> Arc<str> {
    let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let texts = texts.get_or_insert_with(|| Texts { known: HashSet::new(), look_at: LOOK });
    if let Some(known) = texts.known.get(text) {
        return known.clone();
    }
    if texts.known.len() >= texts.look_at {
        texts.known.retain(|text| Arc::strong_count(text) > 1);
        texts.look_at = LOOK.max(texts.known.len() * 2);
    }
    let new: Arc<str> = text.into();
    texts.known.insert(new.clone());
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_text_is_kept_once() {
        assert!(Arc::ptr_eq(&shared("node-a"), &shared("node-a")));
        assert_eq!(&*shared("node-b"), "node-b");
    }

    #[test]
    fn what_nobody_has_is_forgotten() {
        let kept = shared("kept");
        for n in 0..3 * LOOK {
            shared(&format!("gone {n}"));
        }
        let texts = TEXTS.lock().unwrap();
        assert!(texts.as_ref().unwrap().known.len() <= LOOK + 1);
        drop(texts);
        assert!(Arc::ptr_eq(&kept, &shared("kept")));
    }
}
