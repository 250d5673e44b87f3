use super::*;
use crate::mm::{FillTable, MappedTable};

/// The truth, with a hook that runs inside a query.
type Hook = Box<dyn FnMut() + Send>;
#[derive(Default)]
struct Truth {
    vmas: Mutex<Vec<Vma>>,
    during_query: Mutex<Option<Hook>>,
}

impl VmaSource for Truth {
    fn query_from(&self, va: u64) -> io::Result<Option<Vma>> {
        if let Some(hook) = self.during_query.lock().unwrap().as_mut() {
            hook();
        }
        let vmas = self.vmas.lock().unwrap();
        Ok(vmas
            .iter()
            .filter(|v| va < v.end)
            .min_by_key(|v| v.start)
            .copied())
    }
}

fn vma(start: u64, end: u64, inode: u64) -> Vma {
    Vma {
        start,
        end,
        offset: 0,
        dev: 1,
        inode,
        read: true,
        write: false,
        shared: true,
    }
}

struct Bench {
    truth: Arc<Truth>,
    table: Arc<MappedTable>,
    fills: Arc<FillTable>,
    cache: MmCache,
}

fn set_up(vmas: Vec<Vma>) -> Bench {
    let truth = Arc::new(Truth {
        vmas: Mutex::new(vmas),
        during_query: Mutex::default(),
    });
    let table = MappedTable::create().unwrap();
    let fills = FillTable::new(table.clone());
    let cache = MmCache::new(truth.clone(), fills.clone());
    Bench {
        truth,
        table,
        fills,
        cache,
    }
}

impl Bench {
    fn look(&self, va: u64) -> Lookup {
        let permit = self.fills.begin_fill(va, 12).unwrap();
        self.cache.lookup(va, Access::Read, &permit).unwrap()
    }
}

#[test]
fn test_lookup_when_generation_is_the_same_asks_once() {
    let b = set_up(vec![vma(0x1000, 0x9000, 7)]);
    assert_eq!(b.look(0x1000), Lookup::Mapped(vma(0x1000, 0x9000, 7)));
    assert_eq!(b.look(0x8fff), Lookup::Mapped(vma(0x1000, 0x9000, 7)));
    assert_eq!((b.cache.stats().hits, b.cache.stats().queries), (1, 1));
}

#[test]
fn test_lookup_when_a_change_has_happened_asks_again() {
    let b = set_up(vec![vma(0x1000, 0x9000, 7)]);
    b.look(0x1000);
    let change = b.table.begin_change(0x1000, 0x2000);
    *b.truth.vmas.lock().unwrap() = vec![vma(0x1000, 0x9000, 8)];
    drop(change);
    assert_eq!(b.look(0x1000), Lookup::Mapped(vma(0x1000, 0x9000, 8)));
}

#[test]
fn test_lookup_when_mapping_spans_buckets_is_remembered_for_the_permits_only() {
    // A call on bucket 1 has raised the generation and not changed anything yet. A fill in bucket 0 sees the
    // whole old mapping under the new generation: it must not answer for bucket 1 once the call is over.
    let two_mib = 1u64 << 21;
    let b = set_up(vec![vma(0, 2 * two_mib, 7)]);
    let change = b.table.begin_change(two_mib, 2 * two_mib);
    assert!(matches!(b.look(0x1000), Lookup::Mapped(_)));
    *b.truth.vmas.lock().unwrap() = vec![vma(0, two_mib, 7)];
    drop(change);
    assert_eq!(b.look(two_mib), Lookup::NotMapped);
    assert_eq!(b.cache.stats().hits, 0);
}

#[test]
fn test_lookup_when_nothing_is_there_is_never_remembered() {
    let b = set_up(vec![]);
    assert_eq!(b.look(0x1000), Lookup::NotMapped);
    b.truth.vmas.lock().unwrap().push(vma(0x1000, 0x2000, 9));
    assert!(matches!(b.look(0x1000), Lookup::Mapped(_)));
}

#[test]
fn test_lookup_when_access_is_denied_asks_first() {
    let b = set_up(vec![vma(0x1000, 0x2000, 7)]);
    b.look(0x1000);
    let permit = b.fills.begin_fill(0x1000, 12).unwrap();
    let write = |b: &Bench| b.cache.lookup(0x1000, Access::Write, &permit).unwrap();
    assert!(matches!(write(&b), Lookup::Denied(_)));
    assert_eq!(b.cache.stats().queries, 2, "a denial is not answered from memory");
    b.truth.vmas.lock().unwrap()[0].write = true;
    assert!(matches!(write(&b), Lookup::Mapped(_)));
}

#[test]
fn test_s5_lookup_when_change_starts_during_the_query_gives_no_exception() {
    let b = set_up(vec![]);
    let permit = b.fills.begin_fill(0x1000, 12).unwrap();
    let table = b.table.clone();
    let running = Arc::new(Mutex::new(None));
    let keep = running.clone();
    *b.truth.during_query.lock().unwrap() = Some(Box::new(move || {
        keep.lock()
            .unwrap()
            .get_or_insert_with(|| table.begin_change(0x1000, 0x2000));
    }));
    assert_eq!(
        b.cache.lookup(0x1000, Access::Read, &permit).unwrap(),
        Lookup::Busy
    );
    drop(running.lock().unwrap().take());
}

#[test]
fn test_s5_lookup_when_a_whole_change_fits_into_the_query_asks_again() {
    let b = set_up(vec![]);
    let permit = b.fills.begin_fill(0x1000, 12).unwrap();
    let (table, truth) = (b.table.clone(), Arc::downgrade(&b.truth));
    let mut first = true;
    // The query has read "nothing"; the mapping is made before it returns.
    *b.truth.during_query.lock().unwrap() = Some(Box::new(move || {
        if !std::mem::take(&mut first) {
            truth.upgrade().unwrap().vmas.lock().unwrap()[..1].fill(vma(0x1000, 0x2000, 3));
        } else {
            drop(table.begin_change(0x1000, 0x2000));
        }
    }));
    b.truth.vmas.lock().unwrap().push(vma(0x8000, 0x9000, 1));
    assert_eq!(
        b.cache.lookup(0x1000, Access::Read, &permit).unwrap(),
        Lookup::Mapped(vma(0x1000, 0x2000, 3))
    );
}

#[test]
fn test_lookup_when_the_query_is_overtaken_remembers_nothing_for_the_new_generation() {
    let b = set_up(vec![vma(0x1000, 0x2000, 7)]);
    let old = b.fills.begin_fill(0x1000, 12).unwrap();
    drop(b.table.begin_change(0x1000, 0x2000));
    // The old permit's look-up ends late: what it found belongs to the old generation.
    assert!(matches!(
        b.cache.lookup(0x1000, Access::Read, &old).unwrap(),
        Lookup::Mapped(_)
    ));
    b.truth.vmas.lock().unwrap().clear();
    assert_eq!(b.look(0x1000), Lookup::NotMapped);
}

#[test]
fn test_discard_when_called_forgets_what_it_meets() {
    let b = set_up(vec![vma(0x1000, 0x2000, 7), vma(0x4000, 0x5000, 8)]);
    b.look(0x1000);
    b.look(0x4000);
    b.cache.discard(0x1fff, 0x4000);
    b.look(0x4000);
    assert_eq!(b.cache.stats().hits, 1);
    b.look(0x1000);
    assert_eq!(b.cache.stats().queries, 3);
    b.cache.discard_all();
    b.look(0x4000);
    assert_eq!(b.cache.stats().queries, 4);
}

#[test]
#[should_panic(expected = "S9")]
fn test_s9_lookup_when_in_atomic_section_panics() {
    let b = set_up(vec![]);
    let permit = b.fills.begin_fill(0x1000, 12).unwrap();
    let _section = crate::notifier::NonSleeping::enter();
    let _ = b.cache.lookup(0x1000, Access::Read, &permit);
}
