-- The tables of the lake that Flink writes: columns and options as monolith_jax/lake/tables.py and warehouse.py have them, so that
-- the readers there read them. A lake is written either by Flink or by `python -m launch.lake`: never both, see README.md.
-- ${WAREHOUSE}: where the lake is, as `/lake` or `s3://bucket/lake`.

SET 'table.local-time-zone' = 'UTC';
CREATE CATALOG paimon WITH ('type' = 'paimon', 'warehouse' = '${WAREHOUSE}');
CREATE DATABASE IF NOT EXISTS paimon.lake;

CREATE TABLE IF NOT EXISTS paimon.lake.events (
  `day` STRING NOT NULL,
  topic STRING NOT NULL,
  log_partition INT NOT NULL,
  log_offset BIGINT NOT NULL,
  event_time_ms BIGINT NOT NULL,
  request_id BIGINT,
  user_id BIGINT NOT NULL,
  video_id BIGINT NOT NULL,
  author_id BIGINT,
  sound_id BIGINT,
  tag_id ARRAY<BIGINT>,
  duration_ms BIGINT,
  action STRING,
  `value` BIGINT,
  event_id BIGINT
) PARTITIONED BY (`day`) WITH (
  'write.native.enabled' = 'true', 'read.native.enabled' = 'true', 'commit.native.enabled' = 'true'
);

CREATE TABLE IF NOT EXISTS paimon.lake.user_features (
  user_id BIGINT NOT NULL,
  profile_ms BIGINT,
  country STRING,
  `language` STRING,
  age BIGINT,
  activity_ms BIGINT,
  last_video_id BIGINT,
  last_author_id BIGINT,
  last_duration_ms BIGINT,
  last_tag_id ARRAY<BIGINT>,
  PRIMARY KEY (user_id) NOT ENFORCED
) WITH (
  'bucket' = '4',
  'merge-engine' = 'partial-update',
  'fields.profile_ms.sequence-group' = 'country,language,age',
  'fields.activity_ms.sequence-group' = 'last_video_id,last_author_id,last_duration_ms,last_tag_id',
  'write.native.enabled' = 'true', 'read.native.enabled' = 'true', 'commit.native.enabled' = 'true'
);

CREATE TABLE IF NOT EXISTS paimon.lake.user_features_log (
  event_time_ms BIGINT NOT NULL,
  `day` STRING NOT NULL,
  user_id BIGINT NOT NULL,
  profile_ms BIGINT,
  country STRING,
  `language` STRING,
  age BIGINT,
  activity_ms BIGINT,
  last_video_id BIGINT,
  last_author_id BIGINT,
  last_duration_ms BIGINT,
  last_tag_id ARRAY<BIGINT>
) PARTITIONED BY (`day`) WITH (
  'write.native.enabled' = 'true', 'read.native.enabled' = 'true', 'commit.native.enabled' = 'true'
);

CREATE TABLE IF NOT EXISTS paimon.lake.video_features (
  video_id BIGINT NOT NULL,
  profile_ms BIGINT,
  author_id BIGINT,
  sound_id BIGINT,
  tag_id ARRAY<BIGINT>,
  duration_ms BIGINT,
  quality DOUBLE,
  counts_5m_ms BIGINT,
  views_5m BIGINT,
  completes_5m BIGINT,
  likes_5m BIGINT,
  counts_1h_ms BIGINT,
  views_1h BIGINT,
  completes_1h BIGINT,
  likes_1h BIGINT,
  counts_1d_ms BIGINT,
  views_1d BIGINT,
  completes_1d BIGINT,
  likes_1d BIGINT,
  PRIMARY KEY (video_id) NOT ENFORCED
) WITH (
  'bucket' = '4',
  'merge-engine' = 'partial-update',
  'fields.profile_ms.sequence-group' = 'author_id,sound_id,tag_id,duration_ms,quality',
  'fields.counts_5m_ms.sequence-group' = 'views_5m,completes_5m,likes_5m',
  'fields.counts_1h_ms.sequence-group' = 'views_1h,completes_1h,likes_1h',
  'fields.counts_1d_ms.sequence-group' = 'views_1d,completes_1d,likes_1d',
  'write.native.enabled' = 'true', 'read.native.enabled' = 'true', 'commit.native.enabled' = 'true'
);

CREATE TABLE IF NOT EXISTS paimon.lake.video_features_log (
  event_time_ms BIGINT NOT NULL,
  `day` STRING NOT NULL,
  video_id BIGINT NOT NULL,
  profile_ms BIGINT,
  author_id BIGINT,
  sound_id BIGINT,
  tag_id ARRAY<BIGINT>,
  duration_ms BIGINT,
  quality DOUBLE,
  counts_5m_ms BIGINT,
  views_5m BIGINT,
  completes_5m BIGINT,
  likes_5m BIGINT,
  counts_1h_ms BIGINT,
  views_1h BIGINT,
  completes_1h BIGINT,
  likes_1h BIGINT,
  counts_1d_ms BIGINT,
  views_1d BIGINT,
  completes_1d BIGINT,
  likes_1d BIGINT
) PARTITIONED BY (`day`) WITH (
  'write.native.enabled' = 'true', 'read.native.enabled' = 'true', 'commit.native.enabled' = 'true'
);
