//! Sorting with a heap: a tenth of the code of the standard library's sorts, which a device library would hold
//! once for each order. The worst case is `n log n`.

/// Puts the first `count` of `items`, as `before` orders them, to the front, in order. The others follow in any.
pub(crate) fn first<T: Copy>(items: &mut [T], count: usize, before: impl Fn(T, T) -> bool) {
    let Some((heap, rest)) = items.split_at_mut_checked(count) else { return };
    for root in (0..heap.len() / 2).rev() {
        sink(heap, root, &before);
    }
    // The last of those that are kept is on top; what comes before it takes its place.
    if let [top, ..] = heap {
        let mut last = *top;
        for item in rest {
            if before(*item, last) {
                heap[0] = core::mem::replace(item, last);
                sink(heap, 0, &before);
                last = heap[0];
            }
        }
    }
    for end in (1..heap.len()).rev() {
        heap.swap(0, end);
        sink(&mut heap[..end], 0, &before);
    }
}

/// Sorts `items` as `before` orders them.
pub(crate) fn sort<T: Copy>(items: &mut [T], before: impl Fn(T, T) -> bool) {
    first(items, items.len(), before);
}

/// Lets the item at `at` sink until none below comes after it.
fn sink<T: Copy>(heap: &mut [T], mut at: usize, before: &impl Fn(T, T) -> bool) {
    while let Some(&left) = heap.get(2 * at + 1) {
        let child = match heap.get(2 * at + 2) {
            Some(&right) if before(left, right) => 2 * at + 2,
            _ => 2 * at + 1,
        };
        if !before(heap[at], heap[child]) {
            break;
        }
        heap.swap(at, child);
        at = child;
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn sorts_as_the_standard_library_does() {
        proptest!(|(items in prop::collection::vec(0..60u32, 0..200), count in 0..200usize)| {
            let count = count.min(items.len());
            let (mut ours, mut theirs) = (items.clone(), items);
            super::first(&mut ours, count, |a, b| a < b);
            theirs.sort_unstable();
            prop_assert_eq!(&ours[..count], &theirs[..count]);
            super::sort(&mut ours, |a, b| a < b);
            prop_assert_eq!(ours, theirs);
        });
    }

    #[test]
    fn more_than_there_are_changes_nothing() {
        let mut items = Vec::from([3, 1, 2]);
        super::first(&mut items, 4, |a, b| a < b);
        assert_eq!(items, [3, 1, 2]);
        super::sort(&mut [0; 0], |a, b| a < b);
    }
}
