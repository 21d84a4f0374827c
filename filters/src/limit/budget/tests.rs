use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn budget(requests: u64) -> Arc<Budget> {
    let grant = Grant { requests: Some(requests), tokens: Some(1_000), pace_above: 1.0 };
    Arc::new(Budget::new("far".into(), grant, Duration::ZERO, None))
}

async fn all(budget: &Arc<Budget>, tokens: u64) -> usize {
    let ledger = Ledger::in_memory();
    let mut granted = 0;
    while budget.draw(&ledger, tokens, SECOND).await.is_ok() {
        granted += 1;
    }
    granted
}

#[test]
fn what_an_attempt_did_not_use_may_be_used_by_others() {
    futures::executor::block_on(async {
        let (budget, ledger) = (budget(100), Ledger::in_memory());
        let first = budget.draw(&ledger, 600, SECOND).await.unwrap();
        let room_in = budget.draw(&ledger, 600, SECOND).await.unwrap_err();
        assert_eq!(room_in, 12 * SECOND);
        first.used(100);
        assert_eq!(all(&budget, 300).await, 3);
    });
}

#[test]
fn an_attempt_that_was_not_made_costs_no_request() {
    futures::executor::block_on(async {
        let (budget, ledger) = (budget(2), Ledger::in_memory());
        budget.draw(&ledger, 1, SECOND).await.unwrap().unsent();
        assert_eq!(all(&budget, 1).await, 2);
    });
}

#[test]
fn a_new_configuration_goes_on_where_the_old_one_was() {
    futures::executor::block_on(async {
        let before = budget(10);
        assert_eq!(all(&before, 1).await, 10);
        let grant = Grant { requests: Some(20), tokens: None, pace_above: 1.0 };
        let after = Arc::new(Budget::new("far".into(), grant, Duration::ZERO, Some(&before)));
        assert_eq!(all(&after, 1).await, 0);
        assert!(after.draw(&Ledger::in_memory(), 1, 4 * SECOND).await.is_ok());
    });
}
