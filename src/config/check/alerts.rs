//! Checks of `alerts:`.

use super::{At, Check};
use crate::config::When;

impl Check<'_> {
    pub(super) fn alerts(&mut self) {
        for (index, alert) in self.document.alerts.iter().enumerate() {
            let at = At::root().key("alerts").item(index);
            match alert.when {
                When::UpstreamLimitedFor(period) => {
                    self.lasting(&at.key("when").key("upstream_limited_for"), period);
                }
                When::BudgetSpent(share) => {
                    let at = at.key("when").key("budget_spent");
                    if share == 0.0 {
                        self.error(&at, "0 is spent at once", Some("it is a share of the budget, like 0.9".to_owned()));
                    }
                    self.within(&at, share, 0.0, 1.0);
                }
                When::NodeDown => {}
            }
            if alert.address().is_none() {
                // It may hold a secret and is not repeated.
                let hint = "write http://HOST/PATH or https://HOST/PATH, without user and password";
                self.error(&at.key("webhook"), "not an address to post to", Some(hint.to_owned()));
            }
            self.secret(&at.key("secret"), &alert.secret);
        }
    }
}
