//! The file: what it keeps, what it survives and what it refuses.

use std::fs;

use super::*;
use crate::train::loss::Head;
use crate::train::ops::check;

const LENGTH: usize = 6;

fn key(sparsity: Sparsity) -> Key {
    Key {
        sparsity,
        vocab: 40,
        length: LENGTH,
        temperature: 1.5,
        seed: 3,
        teacher: "a".repeat(HASH),
        text: "b".repeat(HASH),
    }
}

fn rows(start: u64) -> (Vec<SparseRow>, Vec<u32>) {
    let head = Head { weight: (check::matrix(2, 40, 8) * 3.0).unwrap(), tiles: None, soft_cap: 0.0 };
    let targets: Vec<u32> = (0..LENGTH as u32).map(|i| if i % 4 == 1 { IGNORE } else { i }).collect();
    let hidden = check::matrix(start + 7, LENGTH, 8);
    let kept = SparseTargets::of(&hidden, &head, Sparsity::Sampled(9), 1.5, 3, start, &targets).unwrap();
    (kept.rows, targets)
}

fn filled(path: &Path) -> Cache {
    let mut cache = Cache::open(path, key(Sparsity::Sampled(9))).unwrap();
    for start in [12, 0, 30] {
        cache.append(start, &rows(start).0).unwrap();
    }
    cache
}

fn open(path: &Path) -> Result<Cache, CacheError> {
    Cache::open(path, key(Sparsity::Sampled(9)))
}

#[test]
fn windows_come_back_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    drop(filled(&path));
    let cache = open(&path).unwrap();
    assert!(cache.has(30) && !cache.has(6) && cache.windows() == 3);
    let both = [rows(0), rows(12)];
    let targets: Vec<u32> = [12, 0].iter().flat_map(|start| rows(*start).1).collect();
    let found = cache.read(&[12, 0], &targets).unwrap();
    for (start, found) in [1, 0].into_iter().zip(found.rows.chunks(LENGTH)) {
        for (found, expected) in found.iter().zip(&both[start].0) {
            assert_eq!((&found.ids, &found.probabilities), (&expected.ids, &expected.probabilities));
        }
    }
    let error = cache.read(&[6], &targets[..LENGTH]).unwrap_err().to_string();
    assert!(error.contains("token 6") && error.contains(FILE), "{error}");
}

/// Whatever length a kill leaves: whole windows stay, the rest can be written again.
#[test]
fn every_kill_leaves_whole_windows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    drop(filled(&path));
    let whole = fs::read(&path).unwrap();
    let window = (whole.len() - HEADER) / 3;
    for length in (0..whole.len()).step_by(7) {
        fs::write(&path, &whole[..length]).unwrap();
        let mut cache = open(&path).unwrap();
        let kept = length.saturating_sub(HEADER) / window;
        assert_eq!(cache.windows(), kept, "{length} bytes");
        for start in [12, 0, 30].into_iter().skip(kept) {
            cache.append(start, &rows(start).0).unwrap();
        }
        assert!(fs::read(&path).unwrap() == whole, "{length} bytes");
    }
}

#[test]
fn every_changed_byte_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    drop(filled(&path));
    let whole = fs::read(&path).unwrap();
    for at in (0..HEADER).chain((HEADER..whole.len()).step_by(5)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        let error = open(&path).unwrap_err();
        assert!(matches!(error, CacheError::Malformed { .. }), "byte {at}: {error}");
        assert!(error.to_string().contains(FILE));
        assert!(fs::read(&path).unwrap() == bytes, "a refused file was changed");
    }
    fs::write(&path, "no cache at all").unwrap();
    assert!(open(&path).unwrap_err().to_string().contains("the header is 15 bytes"));
}

/// Damage after the check at the start is found when the window is read.
#[test]
fn a_window_is_checked_again_when_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let cache = filled(&path);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - CHECK - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(cache.read(&[0], &rows(0).1).is_ok());
    let error = cache.read(&[30], &rows(30).1).unwrap_err().to_string();
    assert!(error.contains("window 2"), "{error}");
}

#[test]
fn another_run_is_told_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    drop(filled(&path));
    let refused = |key: Key, said: &str| {
        let error = Cache::open(&path, key).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    };
    let good = key(Sparsity::Sampled(9));
    refused(key(Sparsity::TopK(9)), "form was sampled=9, now top-k=9");
    refused(Key { temperature: 1.0, ..good.clone() }, "temperature was 1.5, now 1");
    refused(Key { teacher: "c".repeat(HASH), ..good.clone() }, "teacher was aaa");
    refused(Key { length: 7, seed: 1, ..good }, "length was 6, now 7; seed was 3, now 1");
}
