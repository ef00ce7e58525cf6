//! Texts that several objects have in common, kept once: namespaces, services, nodes, the names of ports.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

/// A text that several may have, behind a pointer of one word: there are many.
pub type Text = arcstr::ArcStr;

/// How many texts there are at least before those that nobody has any more are looked for.
const LOOK: usize = 4096;

struct Texts {
    known: HashSet<Text>,
    /// How many there are when those that nobody has any more are looked for.
    look_at: usize,
}

static TEXTS: Mutex<Option<Texts>> = Mutex::new(None);

/// The text, shared with whoever else has it.
pub fn shared(text: &str) -> Text {
    let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let texts = texts.get_or_insert_with(|| Texts { known: HashSet::new(), look_at: LOOK });
    if let Some(known) = texts.known.get(text) {
        return known.clone();
    }
    if texts.known.len() >= texts.look_at {
        texts.known.retain(|text| Text::strong_count(text).is_none_or(|count| count > 1));
        texts.look_at = LOOK.max(texts.known.len() * 2);
    }
    let new: Text = text.into();
    texts.known.insert(new.clone());
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_text_is_kept_once() {
        assert!(Text::ptr_eq(&shared("node-a"), &shared("node-a")));
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
        assert!(Text::ptr_eq(&kept, &shared("kept")));
    }
}
