use futures::FutureExt;
use futures::executor::block_on;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn queue(size: usize, most: u32) -> Arc<Queue> {
    let queue = Arc::<Queue>::default();
    queue.set(size, SECOND, Some(most));
    queue
}

fn state() -> Arc<NodeState> {
    Arc::default()
}

fn waits(queue: &Arc<Queue>, key: &str, nodes: &[&Arc<NodeState>]) -> Ticket {
    match queue.join(&key.into(), nodes.iter().map(|node| Arc::clone(node)).collect()) {
        Joined::Waits(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

fn handed(ticket: &mut Ticket) -> Option<InFlight> {
    ticket.slot().now_or_never().flatten()
}

/// The keys in the order in which they are served, one slot of one node after another.
fn served(queue: &Arc<Queue>, node: &Arc<NodeState>, mut slot: InFlight, mut tickets: Vec<(&str, Ticket)>) -> String {
    let mut order = String::new();
    while !tickets.is_empty() {
        drop(slot);
        let got = tickets.iter_mut().enumerate().find_map(|(at, (_, ticket))| Some((at, handed(ticket)?)));
        let (at, next) = got.expect("somebody is served");
        slot = next;
        order.push_str(tickets.remove(at).0);
        assert_eq!((node.inflight(), queue.waiting()), (1, tickets.len()));
    }
    drop(slot);
    order
}

#[test]
fn keys_take_turns_and_a_key_that_asks_for_little_is_served_next() {
    let (queue, node) = (queue(20, 1), state());
    let slot = node.try_enter(Some(1), &queue).unwrap();
    let tickets = ["a", "a", "a", "a", "b", "c", "b"].map(|key| (key, waits(&queue, key, &[&node])));
    assert_eq!(served(&queue, &node, slot, tickets.into()), "cbabaaa");
    assert_eq!((node.inflight(), queue.waiting()), (0, 0));
}

#[test]
fn a_key_that_comes_back_for_every_slot_does_not_starve_the_others() {
    let (queue, node) = (queue(20, 1), state());
    let mut slot = node.try_enter(Some(1), &queue).unwrap();
    let mut patient: Vec<_> = (0..4).map(|_| waits(&queue, "patient", &[&node])).collect();
    let mut order = String::new();
    while !patient.is_empty() {
        let mut eager = waits(&queue, "eager", &[&node]);
        drop(slot);
        if let Some(got) = handed(&mut eager) {
            (slot, order) = (got, order + "e");
        } else {
            let first = handed(&mut patient[0]);
            slot = first.expect("one of the two, the first of the line");
            patient.remove(0);
            order.push('p');
        }
    }
    assert_eq!(order, "epepepep");
    drop(slot);
    assert_eq!((node.inflight(), queue.waiting()), (0, 0));
}

#[test]
fn a_freed_slot_goes_to_who_waits_and_not_to_who_comes() {
    let (queue, node) = (queue(20, 1), state());
    let slot = node.try_enter(Some(1), &queue).unwrap();
    let mut ticket = waits(&queue, "a", &[&node]);
    drop(slot);
    assert!(node.try_enter(Some(1), &queue).is_none());
    let slot = handed(&mut ticket).expect("handed over");
    assert_eq!((node.inflight(), node.attempts(), queue.waiting()), (1, 2, 0));
    drop((slot, ticket));
    assert!(node.try_enter(Some(1), &queue).is_some());
}

#[test]
fn who_left_gives_the_slot_on_whether_it_was_handed_over_or_not() {
    let (queue, node) = (queue(20, 1), state());
    let slot = node.try_enter(Some(1), &queue).unwrap();
    let [first, second, mut third] = ["a"; 3].map(|key| waits(&queue, key, &[&node]));
    drop(second);
    assert_eq!(queue.waiting(), 2);
    drop(slot);
    // The first has it and does not know yet.
    drop(first);
    assert!(handed(&mut third).is_some());
    assert_eq!((node.inflight(), queue.waiting()), (0, 0));
    drop(third);
    assert_eq!(queue.lines.lock().by_key.len(), 0);
}

#[test]
fn a_queue_takes_as_many_as_it_may_and_a_slot_that_is_free_at_once() {
    let (queue, node, other) = (queue(1, 1), state(), state());
    let _slot = node.try_enter(Some(1), &queue).unwrap();
    let join = |nodes: &[&Arc<NodeState>]| queue.join(&"a".into(), nodes.iter().map(|node| Arc::clone(node)).collect());
    assert!(matches!(join(&[&node, &other]), Joined::Slot(_)));
    let _ticket = waits(&queue, "a", &[&node]);
    assert!(matches!(join(&[&node]), Joined::Full));
    assert!(matches!(join(&[&node, &other]), Joined::Slot(_)));
}

#[test]
fn a_slot_of_another_node_than_was_asked_for_is_not_handed_over() {
    let (queue, node, other) = (queue(20, 1), state(), state());
    let (slot, other_slot) = (node.try_enter(Some(1), &queue).unwrap(), other.try_enter(Some(1), &queue).unwrap());
    let mut ticket = waits(&queue, "a", &[&other]);
    drop(slot);
    assert!(handed(&mut ticket).is_none());
    assert_eq!(node.inflight(), 0);
    drop(other_slot);
    assert!(handed(&mut ticket).is_some());
}

#[test]
fn a_node_that_rests_serves_nobody_until_it_is_back_and_then_all_its_slots_are_filled() {
    let (queue, node) = (queue(20, 2), state());
    let slots = [node.try_enter(Some(2), &queue).unwrap(), node.try_enter(Some(2), &queue).unwrap()];
    let mut tickets = ["a", "b", "c"].map(|key| waits(&queue, key, &[&node]));
    node.ejected.until(SECOND);
    drop(slots);
    assert!(tickets.iter_mut().all(|ticket| handed(ticket).is_none()));
    assert_eq!((node.inflight(), queue.waiting()), (0, 3));
    node.ejected.over();
    queue.fill(&node);
    assert_eq!((node.inflight(), queue.waiting()), (2, 1));
    let given = tickets.iter_mut().filter_map(handed).collect::<Vec<_>>();
    assert_eq!(given.len(), 2);
}

#[test]
fn fewer_slots_after_a_reload_are_kept_to_and_more_are_handed_out() {
    let (queue, node) = (queue(20, 2), state());
    let [one, two] = [node.try_enter(Some(2), &queue).unwrap(), node.try_enter(Some(2), &queue).unwrap()];
    let mut tickets = ["a", "b", "c"].map(|key| waits(&queue, key, &[&node]));
    queue.set(20, SECOND, Some(1));
    drop(one);
    assert_eq!((node.inflight(), queue.waiting()), (1, 3));
    drop(two);
    assert_eq!((node.inflight(), queue.waiting()), (1, 2));
    queue.set(20, SECOND, Some(3));
    queue.fill(&node);
    assert_eq!((node.inflight(), queue.waiting()), (3, 0));
    assert_eq!(tickets.iter_mut().filter_map(handed).count(), 3);
}

/// Many threads come, wait, leave and work: never more at work than slots, and nobody is forgotten.
#[test]
fn no_slot_is_lost_and_none_is_given_twice_under_load() {
    let (queue, nodes) = (queue(1_000, 2), [state(), state()]);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (queue, nodes) = (Arc::clone(&queue), &nodes);
            scope.spawn(move || {
                let key: Arc<str> = format!("key-{}", thread % 3).into();
                for turn in 0..400_u64 {
                    let entered = nodes.iter().find_map(|node| node.try_enter(Some(2), &queue));
                    let slot = match entered {
                        Some(slot) => slot,
                        None => match queue.join(&key, nodes.iter().map(Arc::clone).collect()) {
                            Joined::Slot(slot) => slot,
                            Joined::Waits(ticket) if (turn + thread) % 5 == 0 => {
                                std::thread::yield_now();
                                drop(ticket);
                                continue;
                            }
                            Joined::Waits(mut ticket) => block_on(ticket.slot()).expect("a slot"),
                            Joined::Full => panic!("there is room"),
                        },
                    };
                    assert!(nodes.iter().all(|node| node.inflight() <= 2));
                    std::thread::yield_now();
                    drop(slot);
                }
            });
        }
    });
    assert_eq!((nodes[0].inflight(), nodes[1].inflight(), queue.waiting()), (0, 0, 0));
}
