//! Threads that play processes, for tests.

use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::Communicator;

/// What goes to another thread, and what comes from it.
type Peer = (Sender<Vec<u8>>, Receiver<Vec<u8>>);

/// One of a group of threads. The first one has a pair of channels to each other thread, which has one to the
/// first; a thread that is gone makes the others panic.
#[derive(Debug)]
pub(crate) struct Threads {
    rank: usize,
    size: usize,
    peers: Vec<Peer>,
}

impl Threads {
    /// The members of a group, to be moved to a thread each.
    pub fn group(size: usize) -> Vec<Self> {
        let mut first = Self { rank: 0, size, peers: vec![] };
        let mut others = Vec::new();
        for rank in 1..size {
            let ((down, from_first), (up, from_other)) = (channel(), channel());
            first.peers.push((down, from_other));
            others.push(Self { rank, size, peers: vec![(up, from_first)] });
        }
        others.insert(0, first);
        others
    }

    /// Runs `body` in each of `size` threads; the answers by rank.
    pub fn run<T: Send>(size: usize, body: impl Fn(Rc<Self>) -> T + Sync) -> Vec<T> {
        let body = &body;
        std::thread::scope(|scope| {
            let start = |process| scope.spawn(move || body(Rc::new(process)));
            let threads: Vec<_> = Self::group(size).into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
        })
    }

    fn send_to_all(&self, bytes: &[u8]) {
        self.peers.iter().for_each(|(peer, _)| peer.send(bytes.to_vec()).expect("the other thread runs"));
    }

    fn receive(&self, peer: usize) -> Vec<u8> {
        self.peers[peer].1.recv().expect("the other thread runs")
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn from_bytes(bytes: &[u8], values: &mut [f32], with: impl Fn(&mut f32, f32)) {
    assert_eq!(bytes.len(), 4 * values.len(), "all processes give as many values");
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        with(value, f32::from_le_bytes(*bytes));
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local_rank(&self) -> usize {
        self.rank
    }

    fn all_reduce(&self, values: &mut [f32]) {
        if self.rank > 0 {
            self.send_to_all(&to_bytes(values));
        } else {
            for peer in 0..self.peers.len() {
                from_bytes(&self.receive(peer), values, |sum, value| *sum += value);
            }
        }
        self.broadcast(values);
    }

    fn broadcast(&self, values: &mut [f32]) {
        let mut bytes = to_bytes(values);
        self.broadcast_bytes(&mut bytes);
        from_bytes(&bytes, values, |value, new| *value = new);
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>) {
        if self.rank == 0 {
            self.send_to_all(bytes);
        } else {
            *bytes = self.receive(0);
        }
    }

    fn abort(&self) {}
}
