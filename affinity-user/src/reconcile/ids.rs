//! Service and backend ids: given out in order, on record before they are used, never twice.

use std::{collections::BTreeMap, ops::Range};

use affinity_common::{
    abi::ids::NextIds,
    types::{BackendId, ServiceId},
};

use super::{ReconcileError, counts::Counts};
use crate::{
    model::ServicePortName,
    tables::{BoxTable, ONLY},
};

/// What is known of ids.
pub(super) struct Ids {
    next: NextIds,
    /// What the map holds.
    recorded: NextIds,
    services: BTreeMap<ServicePortName, ServiceId>,
}

impl Ids {
    /// Takes over ids: what the map holds, and the least that is greater than every id that was found in use.
    pub fn adopt(recorded: NextIds, beyond: NextIds, services: BTreeMap<ServicePortName, ServiceId>) -> Self {
        // 0 is no id.
        let first = NextIds { service: ServiceId { id: 1 }, backend: BackendId { id: 1 } };
        let next = NextIds {
            service: recorded.service.max(beyond.service).max(first.service),
            backend: recorded.backend.max(beyond.backend).max(first.backend),
        };
        if recorded != NextIds::default() && (beyond.service > recorded.service || beyond.backend > recorded.backend) {
            tracing::warn!(?recorded, ?beyond, "ids in use are beyond the record: going on from what is in use");
        }
        Self { next, recorded, services }
    }

    /// Packs what it keeps: see [`super::Reconciler`].
    pub fn pack(&mut self) {
        super::pack(&mut self.services);
    }

    /// The id of a service port, if it has one.
    pub fn get(&self, name: &ServicePortName) -> Option<ServiceId> {
        self.services.get(name).copied()
    }

    /// The service port that has an id: for errors, since it is looked for among all.
    pub fn name(&self, id: ServiceId) -> Option<&ServicePortName> {
        self.services().find(|(_, has)| *has == id).map(|(name, _)| name)
    }

    /// Every service port that has an id.
    pub fn services(&self) -> impl Iterator<Item = (&ServicePortName, ServiceId)> {
        self.services.iter().map(|(name, id)| (name, *id))
    }

    /// The id of a service port, a new one if it has none.
    pub fn service(
        &mut self,
        table: &mut BoxTable<u32, NextIds>,
        counts: &mut Counts,
        name: &ServicePortName,
    ) -> Result<ServiceId, ReconcileError> {
        if let Some(id) = self.get(name) {
            return Ok(id);
        }
        let id = self.next.service;
        let after = id.id.checked_add(1).ok_or(ReconcileError::NoIds { of: "service" })?;
        self.advance(table, counts, NextIds { service: ServiceId { id: after }, ..self.next })?;
        self.services.insert(name.clone(), id);
        Ok(id)
    }

    /// So many new backend ids.
    pub fn backends(
        &mut self,
        table: &mut BoxTable<u32, NextIds>,
        counts: &mut Counts,
        count: usize,
    ) -> Result<Range<u32>, ReconcileError> {
        let first = self.next.backend.id;
        if count == 0 {
            return Ok(first..first);
        }
        let after = u32::try_from(count).ok().and_then(|count| first.checked_add(count));
        let after = after.ok_or(ReconcileError::NoIds { of: "backend" })?;
        self.advance(table, counts, NextIds { backend: BackendId { id: after }, ..self.next })?;
        Ok(first..after)
    }

    /// The service port is no more. Its id is not given out again.
    pub fn forget(&mut self, name: &ServicePortName) {
        self.services.remove(name);
    }

    /// Puts the record right if the map was found to hold something else. Returns whether it was.
    pub fn repair(
        &mut self,
        table: &mut BoxTable<u32, NextIds>,
        counts: &mut Counts,
        found: NextIds,
    ) -> Result<bool, ReconcileError> {
        if found == self.recorded {
            return Ok(false);
        }
        let next =
            NextIds { service: self.next.service.max(found.service), backend: self.next.backend.max(found.backend) };
        self.recorded = found;
        self.advance(table, counts, next)?;
        Ok(true)
    }

    fn advance(
        &mut self,
        table: &mut BoxTable<u32, NextIds>,
        counts: &mut Counts,
        next: NextIds,
    ) -> Result<(), ReconcileError> {
        counts.put(table, &ONLY, &next)?;
        self.recorded = next;
        self.next = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::types::Proto;
    use nix::errno::Errno;

    use super::*;
    use crate::{
        model::ServiceName,
        tables::{
            faulty::{Fault, Faults},
            memory::{MemoryArray, Wrapper},
        },
    };

    fn name(service: &str) -> ServicePortName {
        ServicePortName { service: ServiceName::new("default", service), port: "".into(), proto: Proto::TCP }
    }

    fn ids(service: u32, backend: u32) -> NextIds {
        NextIds { service: ServiceId { id: service }, backend: BackendId { id: backend } }
    }

    struct Fixture {
        faults: Faults,
        table: BoxTable<u32, NextIds>,
        counts: Counts,
    }

    fn fixture() -> Fixture {
        let faults = Faults::default();
        Fixture { table: faults.wrap(MemoryArray::new("ids", 1)), faults, counts: Counts::default() }
    }

    #[test]
    fn ids_go_on_from_the_record_and_from_what_is_in_use() {
        for (recorded, beyond, first) in
            [(ids(0, 0), ids(0, 0), 1), (ids(5, 9), ids(3, 3), 5), (ids(5, 9), ids(8, 3), 8)]
        {
            let mut f = fixture();
            let mut ids = Ids::adopt(recorded, beyond, BTreeMap::new());
            let id = ids.service(&mut f.table, &mut f.counts, &name("a")).unwrap();
            assert_eq!(id.id, first);
            assert_eq!(f.table.get(&ONLY).unwrap().unwrap().service.id, first + 1, "on record before it is used");
            assert_eq!(ids.service(&mut f.table, &mut f.counts, &name("a")).unwrap(), id);
            assert_eq!(ids.service(&mut f.table, &mut f.counts, &name("b")).unwrap().id, first + 1);
            ids.forget(&name("a"));
            assert_eq!(ids.service(&mut f.table, &mut f.counts, &name("a")).unwrap().id, first + 2);
        }
    }

    #[test]
    fn what_is_not_on_record_is_not_given_out() {
        let mut f = fixture();
        let mut ids = Ids::adopt(NextIds::default(), NextIds::default(), BTreeMap::new());
        f.faults.fail_next(2, Fault::Errno(Errno::ENOMEM));
        ids.backends(&mut f.table, &mut f.counts, 3).unwrap_err();
        ids.service(&mut f.table, &mut f.counts, &name("a")).unwrap_err();
        assert_eq!(ids.get(&name("a")), None);
        assert_eq!(ids.backends(&mut f.table, &mut f.counts, 3).unwrap(), 1..4);
    }

    #[test]
    fn running_out_is_an_error_and_no_wrap() {
        let mut f = fixture();
        let mut ids = Ids::adopt(ids(u32::MAX, u32::MAX - 2), NextIds::default(), BTreeMap::new());
        let refused = ids.service(&mut f.table, &mut f.counts, &name("a")).unwrap_err();
        assert_eq!(refused.to_string(), "every service id was given out: run `affinity cleanup` and start again");
        ids.backends(&mut f.table, &mut f.counts, 3).unwrap_err();
        assert_eq!(ids.backends(&mut f.table, &mut f.counts, 2).unwrap(), u32::MAX - 2..u32::MAX);
        ids.backends(&mut f.table, &mut f.counts, 1).unwrap_err();
    }
}
