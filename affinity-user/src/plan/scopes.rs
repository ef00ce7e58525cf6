//! Which endpoints frontends lead to.

use affinity_common::{
    abi::{
        backends::Backend,
        frontends::{CLUSTER, LOCAL},
    },
    family::Family,
};

/// Which endpoints a frontend leads to. Clients have an affinity of their own in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// All that the node's topology allows.
    Cluster,
    /// Those on this node.
    Local,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 2] = [Self::Cluster, Self::Local];

    /// What stands for it in maps.
    pub const fn number(self) -> u16 {
        match self {
            Self::Cluster => CLUSTER,
            Self::Local => LOCAL,
        }
    }
}

/// Some of the scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes {
    /// Whether [`Scope::Cluster`] is one of them.
    pub cluster: bool,
    /// Whether [`Scope::Local`] is one of them.
    pub local: bool,
}

impl Scopes {
    /// Whether a scope is one of them.
    pub const fn has(self, scope: Scope) -> bool {
        match scope {
            Scope::Cluster => self.cluster,
            Scope::Local => self.local,
        }
    }

    /// Those that a row of `backends` is eligible in, whichever version has written it.
    pub const fn of_row<F: Family>(row: &Backend<F>) -> Self {
        Self { cluster: row.is_eligible(CLUSTER), local: row.is_eligible(LOCAL) }
    }

    /// The one that stands in maps for this.
    pub const fn of_number(number: u16) -> Self {
        Self { cluster: number != LOCAL, local: number == LOCAL }
    }

    /// Whether there is one.
    pub const fn any(self) -> bool {
        self.cluster || self.local
    }

    /// Whether all of them are among others.
    pub const fn are_within(self, others: Self) -> bool {
        (!self.cluster || others.cluster) && (!self.local || others.local)
    }

    /// Those that are among these or others.
    #[must_use]
    pub const fn and(self, others: Self) -> Self {
        Self { cluster: self.cluster || others.cluster, local: self.local || others.local }
    }

    /// Those of these that are not among others, as far as they are in use.
    #[must_use]
    pub const fn lost(self, others: Self, in_use: Self) -> Self {
        Self {
            cluster: self.cluster && !others.cluster && in_use.cluster,
            local: self.local && !others.local && in_use.local,
        }
    }

    /// Adds one.
    pub const fn insert(&mut self, scope: Scope) {
        match scope {
            Scope::Cluster => self.cluster = true,
            Scope::Local => self.local = true,
        }
    }

    /// A character for them: `+` of the cluster, `l` local, `*` both, `-` none.
    pub const fn mark(self) -> char {
        match (self.cluster, self.local) {
            (true, false) => '+',
            (false, true) => 'l',
            (true, true) => '*',
            (false, false) => '-',
        }
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        let mut all = Self::default();
        scopes.into_iter().for_each(|scope| all.insert(scope));
        all
    }
}
