//! The plan's number of bytes is enough at any address, one byte less is refused, and nothing outside the
//! arena is touched.

use edge_runtime::Code;
use edge_runtime::format::Gguf;
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{CacheType, Limits, Plan, Session};
use edge_runtime::workers::Single;
use edge_tests::{TinyAdapter, TinyModel};

const CONTEXT: usize = 24;

/// Every option that has a place in the arena, and none.
fn limits() -> [Limits; 3] {
    let plain = Limits { context: CONTEXT, batch: 8, logits_rows: 2, ..Limits::default() };
    let adapters = Limits { adapters: 2, adapter_rank: 20, ..plain };
    [plain, adapters, Limits { cache: CacheType::Q8_0, ..adapters }]
}
/// The alignment that anything in the arena may need, and more.
const OFFSETS: usize = 128;
const GUARD: u8 = 0xA5;

#[test]
fn every_smaller_arena_is_refused() {
    let bytes = TinyModel::gguf();
    let file = Gguf::parse(&bytes).unwrap();
    for limits in limits() {
        let plan = Plan::new(&file, limits).unwrap();
        let needed = plan.arena_bytes();
        let mut memory = vec![0u8; needed];
        let sizes = (0..needed).step_by(509).chain(needed - 64..needed);
        for size in sizes {
            let arena = &mut memory[..size];
            let error = Session::new(&file, &plan, Kernels::generic(), &Single, arena).unwrap_err();
            assert_eq!(
                (error.code, error.found, error.expected),
                (Code::ArenaTooSmall, size as u64, needed as u64)
            );
        }
        Session::new(&file, &plan, Kernels::generic(), &Single, &mut memory).unwrap();
    }
}

#[test]
fn the_planned_arena_is_enough_at_any_address_and_never_left() {
    let bytes = TinyModel::gguf();
    let file = Gguf::parse(&bytes).unwrap();
    let adapter = TinyAdapter::gguf(1, 20);
    let adapter = Gguf::parse(&adapter).unwrap();
    let tokens: Vec<u32> = (2..2 + CONTEXT as u32).collect();
    for limits in limits() {
        let plan = Plan::new(&file, limits).unwrap();
        let needed = plan.arena_bytes();
        let mut logits: Option<Vec<f32>> = None;
        for offset in 0..OFFSETS {
            let mut memory = vec![GUARD; needed + 2 * OFFSETS];
            let arena = &mut memory[offset..][..needed];
            let mut session = Session::new(&file, &plan, Kernels::generic(), &Single, arena).unwrap();
            for slot in 0..limits.adapters {
                session.attach(slot, &adapter, 0.5).unwrap();
            }
            session.feed_all(&tokens[..CONTEXT - 1], &mut |_, _| {}).unwrap();
            session.feed(&tokens[CONTEXT - 1..]).unwrap();
            match &logits {
                Some(logits) => assert_eq!(session.logits(), logits, "at offset {offset}"),
                None => logits = Some(session.logits().to_vec()),
            }
            let outside = memory[..offset].iter().chain(&memory[offset + needed..]);
            assert!(
                outside.copied().all(|byte| byte == GUARD),
                "written beside the arena at offset {offset}"
            );
        }
    }
}
